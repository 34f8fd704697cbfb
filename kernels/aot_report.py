"""Compile every Triton kernel ahead of time, without a GPU, and report what the compiler made of it.

    python -m rlaif_fast_kernels.aot_report [--arch 80 90 100] [--match NAME]

Every kernel file declares its production configurations in `aot_configs()`. Each is compiled for each
architecture and the machine code is read out: registers, static and dynamic shared memory, stack, local
loads and stores (spills), and the width of global accesses. The exit status is 1 if any configuration
spills.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlaif_fast_kernels.launch import INTERPRETED, AotConfig

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one configuration on one architecture.

    Attributes:
        kernel: Name of the kernel.
        label: Which of its configurations.
        arch: Compute capability times ten.
        warps: Warps a program.
        registers: A thread.
        shared: Bytes of shared memory a program.
        stack: Bytes of stack a thread.
        local_loads, local_stores: Instructions on local memory (LDL, STL): spilled registers.
        load_bits, store_bits: Width of the widest global access of a thread.
        instructions: Length of the machine code.
    """

    kernel: str
    label: str
    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    local_loads: int
    local_stores: int
    load_bits: int
    store_bits: int
    instructions: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local_loads or self.local_stores)


def modules() -> Iterator[str]:
    """Yield the importable name of each kernel file beside this one."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        yield f"rlaif_fast_kernels.{path.stem}"


def configurations() -> list[AotConfig]:
    """Return what every kernel file declares (see `AotConfig`; plain tuples of its fields will do)."""
    declared = (getattr(importlib.import_module(name), "aot_configs", None) for name in modules())
    return [AotConfig(*config) for configs in declared if configs is not None for config in configs()]


def compile_config(config: AotConfig, arch: int) -> Compiled:
    """Compile one configuration for one architecture and read the machine code."""
    kernel = config.kernel
    types = {name: config.signature.get(name, "constexpr").removesuffix(":16") for name in kernel.arg_names}
    missing = [name for name, kind in types.items() if kind == "constexpr" and name not in config.constexprs]
    if missing:
        raise ValueError(
            f"{kernel.__name__} [{config.label}]: neither a type nor a value for {', '.join(missing)}"
        )
    divisible = [
        i for i, name in enumerate(kernel.arg_names) if config.signature.get(name, "").endswith(":16")
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=dict(config.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    usage, code = _disassemble(compiled.asm["cubin"])
    return Compiled(
        kernel=kernel.__name__,
        label=config.label,
        arch=arch,
        warps=config.num_warps,
        registers=_field(usage, "REG"),
        shared=max(compiled.metadata.shared, _field(usage, "SHARED")),
        stack=max(_field(usage, "STACK"), _field(usage, "LOCAL")),
        local_loads=len(re.findall(r"\bLDL\b", code)),
        local_stores=len(re.findall(r"\bSTL\b", code)),
        load_bits=_width(code, "LDG"),
        store_bits=_width(code, "STG"),
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the machine code in text, by the cuobjdump that comes with Triton."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        ]
    return texts[0], texts[1]


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no {name}:\n{usage}")
    return int(found[1])


def _width(code: str, instruction: str) -> int:
    """Return the widest access in bits; 0 where there is none."""
    widths = [0]
    for suffixes in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        named = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", suffixes)
        widths.append(int(named[1]) if named else 32)
    return max(widths)


def table(results: list[Compiled]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| kernel | configuration | sm | warps | registers | shared B | stack B | LDL | STL "
        "| widest load / store, bits | instructions |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r.kernel} | {r.label} | {r.arch} | {r.warps} | {r.registers} | {r.shared} | {r.stack} "
            f"| {r.local_loads} | {r.local_stores} | {r.load_bits} / {r.store_bits} | {r.instructions} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compile, print the table, return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--match", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter replaces the compiler; unset it")
    results = [
        compile_config(config, arch)
        for config in configurations()
        if arguments.match in config.kernel.__name__
        for arch in arguments.arch
    ]
    print(f"Triton {triton.__version__}\n\n{table(results)}")
    spilled = [r for r in results if r.spills]
    for r in spilled:
        print(f"SPILLS: {r.kernel} [{r.label}] sm_{r.arch}", file=sys.stderr)
    return 1 if spilled or not results else 0


if __name__ == "__main__":
    sys.exit(main())
