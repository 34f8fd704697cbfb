"""The ahead-of-time gate: every Triton kernel compiles for each architecture without spills, and is reported.

Each test compiles in a process of its own: this one may have the interpreter in place of the compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
KERNELS = sorted(
    name
    for path in (ROOT / "kernels").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": PATHS}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


def rows(report: str) -> list[dict[str, str]]:
    """Return the lines of the report's table."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.splitlines()
        if line[:1] == "|"
    ]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def check(report: subprocess.CompletedProcess[str], *archs: str) -> None:
    assert report.returncode == 0, report.stderr[-3000:]
    table = rows(report.stdout)
    for name in KERNELS:
        assert {row["sm"] for row in table if row["kernel"] == name} == set(archs), name
    for row in table:
        assert (row["stack B"], row["LDL"], row["STL"]) == ("0", "0", "0"), row
        assert 0 < int(row["registers"]) <= 255
        # Two stages of keys and values: Triton opts in at launch, and four programs share an SM of sm_80 and later.
        most = 52 * 1024 if row["kernel"] == "prefix_part_kernel" else 48 * 1024
        assert int(row["shared B"]) <= most
    # What the row kernels are built for: 16-byte accesses.
    for row in table:
        if row["kernel"] == "row_loss_kernel":
            assert row["widest load / store, bits"] == "128 / 128", row


def test_every_kernel_compiles_without_spills() -> None:
    assert len(KERNELS) >= 8
    check(run("-m", "rlaif_fast_kernels.aot_report", "--arch", "90"), "90")


@pytest.mark.slow
def test_every_architecture_compiles_without_spills() -> None:
    check(run("-m", "rlaif_fast_kernels.aot_report"), "80", "90", "100")


def test_the_gate_sees_spills() -> None:
    report = run("tests/spilling_kernel.py")
    assert report.returncode == 0, report.stderr[-3000:]
    lines = [line.split() for line in report.stdout.splitlines()]
    assert [(line[0], line[1]) for line in lines] == [("128", "False"), ("8192", "True")]
    assert int(lines[1][3]) > 0


def test_the_interpreter_is_refused() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": PATHS}
    report = subprocess.run(
        [sys.executable, "-m", "rlaif_fast_kernels.aot_report"],
        env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert report.returncode == 2
    assert "unset it" in report.stderr


def test_every_launch_passes_the_frontend() -> None:
    report = run("tests/launched_kernels.py")
    assert report.returncode == 0, report.stderr[-3000:]
    compiled = {line.split()[1] for line in report.stdout.splitlines()}
    assert compiled == {name for name in KERNELS if name != "patchify_kernel"}
