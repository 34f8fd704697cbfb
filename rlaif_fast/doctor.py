"""`python -m rlaif_fast.doctor`: what can run on this machine, and why the rest cannot; `--check` runs it.

`--model PATH` says how a model would be trained, or why not, without reading its weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

from rlaif_fast import __version__
from rlaif_fast.cli import run_command
from rlaif_fast.command_parser import CommandParser
from rlaif_fast.loss import backends, extension
from rlaif_fast.machine import cores as available_cores


@dataclass(frozen=True)
class Finding:
    """One line of the report: a component, whether it is there, and which one or why not."""

    name: str
    available: bool
    detail: str


def machine() -> list[Finding]:
    """Return what the machine and PyTorch offer."""
    cores = available_cores()
    capability = torch.backends.cpu.get_cpu_capability()
    cuda = torch.cuda.is_available()
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability(0)
        memory = properties.total_memory / 2**30
        device = f"{properties.name}, {memory:.0f} GiB, sm_{major}{minor}, CUDA {torch.version.cuda}"
    elif torch.version.cuda is None:
        device = f"torch {torch.__version__} was built without CUDA"
    else:
        device = f"torch was built for CUDA {torch.version.cuda}, but finds no device"
    nvcc = shutil.which("nvcc")
    return [
        Finding("python", True, f"{platform.python_version()} on {platform.platform()}"),
        Finding("CPU", True, f"{platform.machine()}, {cores} cores, {capability}"),
        Finding("torch", True, f"{torch.__version__}, threads: {torch.get_num_threads()}"),
        Finding("CUDA device", cuda, device),
        Finding("nvcc", nvcc is not None, nvcc or "not on the PATH; needed to build the CUDA kernel only"),
    ]


def built_extension() -> Finding:
    """Return whether the compiled extension loads, and how it was built."""
    reason = extension.unavailable()
    if reason is not None:
        return Finding("rlaif_fast._C", False, reason)
    info = extension.load().build_info()
    cuda = f"CUDA {info['cuda']} for {info['cuda_architectures']}" if info["cuda"] else "no CUDA"
    chosen = torch.ops.rlaif_fast.row_instruction_set()
    sets = f"{info['instruction_sets']} (uses {chosen})"
    return Finding("rlaif_fast._C", True, f"{info['compiler']}, torch {info['torch']}, {sets}, {cuda}")


def package(name: str, module: str, distributions: tuple[str, ...], purpose: str) -> Finding:
    """Return whether an optional package can be imported, and its version."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(name, False, f"not installed; {purpose}")
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name, False, f"does not load: {error}")
    for distribution in distributions:
        try:
            return Finding(name, True, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return Finding(name, True, "version unknown")


def packages() -> list[Finding]:
    """Return what the optional packages offer."""
    dali = tuple(f"nvidia-dali-cuda{version}" for version in (130, 120, 110))
    return [
        package("triton", "triton", ("triton",), "the GPU kernels need it"),
        package("flash-attn", "flash_attn", ("flash-attn",), "attention falls back to PyTorch's own"),
        package("DALI", "nvidia.dali", dali, "video can then not be decoded by it"),
        package("PyAV", "av", ("av",), "video can then not be decoded by it"),
        package("transformers", "transformers", ("transformers",), "training needs it"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if a check failed, else 0."""
    parser = CommandParser(prog="python -m rlaif_fast.doctor", description=__doc__)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--check",
        action="store_true",
        help="run every kernel, attention backend and GPU decoder against its reference",
    )
    modes.add_argument(
        "--model", metavar="PATH", help="say how this model would be trained, or why not, without its weights"
    )
    options = parser.parse_args(argv)
    if options.check:
        return run_command(check)
    if options.model is not None:
        return run_command(lambda: check_model(options.model))
    return run_command(report)


def report() -> int:
    """Print the findings; returns 0."""
    findings = [*machine(), built_extension(), *packages()]
    statuses = backends.report()
    try:
        _print_tables(findings, statuses)
    except ImportError:  # rich is optional
        _print_lines(findings, statuses)
    return 0


def check() -> int:
    """Check everything on this machine against its references, one line each; returns 1 if a check failed."""
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        # Triton reads it when torch imports it, which has already happened in this process.
        command = [sys.executable, "-m", "rlaif_fast.doctor", "--check"]
        return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})
    from rlaif_fast.checkup import checks

    start, failed, ran = time.perf_counter(), 0, 0
    print(f"{'check':<34} {'result':<8} {'error':>9} {'bound':>9} {'ms':>7}  why not")
    for found in checks():
        failed += found.failed
        ran += found.error is not None
        result = "FAILED" if found.failed else "skipped" if found.error is None else "ok"
        error = "" if found.error is None else f"{found.error:.1e}"
        bound = "" if found.error is None else f"{found.tolerance:.1e}"
        figures = f"{error:>9} {bound:>9} {1000 * found.seconds:>7.0f}"
        print(f"{found.name:<34} {result:<8} {figures}  {found.reason}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{ran} checks ran, {failed} failed, in {seconds:.0f} s")
    return 1 if failed else 0


def check_model(model: str) -> int:
    """Say how a model would be trained; returns 1 if it would be refused, else 0.

    Raises:
        UsageError: It is the tiny model, which a run makes.
    """
    from rlaif_fast.errors import UsageError
    from rlaif_fast.prompts.describe import describe_model
    from rlaif_fast.trainer.cached_model import refuse_made

    refuse_made(model)
    try:
        lines = describe_model(model)
    except UsageError as error:
        print(f"refused: {error}")
        return 1
    for name, detail in lines:
        print(f"{name:<14} {detail}")
    return 0


def _print_tables(findings: list[Finding], statuses: list[backends.BackendStatus]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def mark(available: bool) -> str:
        return "[green]yes[/]" if available else "[red]no[/]"

    console = Console(width=max(100, shutil.get_terminal_size().columns))
    parts = Table("component", "there", "what", title=f"rlaif_fast {__version__}", title_justify="left")
    for finding in findings:
        parts.add_row(escape(finding.name), mark(finding.available), escape(finding.detail))
    table = Table(
        "operation", "backend", "runs", "why not", title="backends, best first", title_justify="left"
    )
    for op in backends.OPS:
        for status in (s for s in statuses if s.op == op):
            table.add_row(op, status.name, mark(status.available), escape(status.reason))
        table.add_section()
    console.print(parts)
    console.print(table)


def _print_lines(findings: list[Finding], statuses: list[backends.BackendStatus]) -> None:
    print(f"rlaif_fast {__version__}")
    for finding in findings:
        print(f"  {finding.name:<14} {'yes' if finding.available else 'no':<4} {finding.detail}")
    print("backends, best first")
    for status in statuses:
        print(f"  {status.op:<14} {status.name:<10} {'yes' if status.available else 'no':<4} {status.reason}")


if __name__ == "__main__":
    raise SystemExit(main())
