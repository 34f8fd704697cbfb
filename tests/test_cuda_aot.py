"""Every .cu file compiles for every target architecture, without register spills.

No GPU is needed: nvcc compiles to machine code and ptxas reports registers, stack and spills. A CPU build of
PyTorch ships the CUDA headers but for one generated file, for which a stand-in defines what it says of a
shared build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 64  # at 128 threads a block, 64 registers let 8 blocks share an SM

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def compile_for(source: Path, where: Path, architectures: tuple[int, ...]) -> str:
    """Compile for the architectures in one call; return what ptxas reports."""
    include = Path(torch.__file__).parent / "include"
    stand_in = where / "c10/cuda/impl/cuda_cmake_macros.h"
    if not (include / stand_in.relative_to(where)).exists():
        stand_in.parent.mkdir(parents=True)
        stand_in.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    command = ["nvcc", "-std=c++20", "-O3", "-Xptxas", "-v", "-fatbin", "-o", str(where / "out.fatbin")]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command += [f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
    command += [f"-I{path}" for path in (where, include, include / "torch/csrc/api/include")]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_there_is_a_kernel():
    assert [source.name for source in SOURCES] == ["rank_penalty.cu"]


@pytest.mark.parametrize(
    "architectures", [(90,), pytest.param(ARCHITECTURES, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source, architectures, tmp_path):
    report = compile_for(source, tmp_path, architectures)
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    assert {int(arch) for _, arch, *_ in found} == set(architectures), report
    for name, arch, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        print(f"{source.name} sm_{arch}: {registers} registers, {stack} B stack, {stores + loads} B spilled")
        assert (stack, stores, loads) == (0, 0, 0), name
        assert registers <= MAX_REGISTERS, name
