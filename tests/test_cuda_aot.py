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
# At 128 threads a block, 64 registers let 8 blocks of the rank penalty share an SM; a block of the row loss has 1024.
MAX_REGISTERS = 64

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


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
    assert [source.name for source in SOURCES] == ["rank_penalty.cu", "row_loss.cu"]


@needs_nvcc
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
    assert found
    for name, arch, *numbers in found:
        stack, stores, loads, registers = map(int, numbers)
        print(f"{source.name} sm_{arch}: {registers} registers, {stack} B stack, {stores + loads} B spilled")
        assert (stack, stores, loads) == (0, 0, 0), name
        assert registers <= MAX_REGISTERS, name


EMULATION = """
#include <cstdio>
#include <vector>
#include "row_cluster.h"
using namespace rlaif;
int main() {
  for (long long V : {8LL, 16LL, 24LL, 8192LL, 8200LL, 16400LL, 32000LL, 151936LL, 152064LL, 225280LL}) {
    if (!row_fits(V, 2)) return 1;
    const int vectors = static_cast<int>(V / 8);
    std::vector<int> seen(vectors);
    for (int block = 0; block < kClusterBlocks; ++block) {
      const Share share = share_of(block, vectors);
      if (share.count * kVectorBytes > kMaxSharedBytes || share.count > share_of(0, vectors).count) return 2;
      for (int thread = 0; thread < kClusterThreads; ++thread) {
        for (int v = thread; v < share.count; v += kClusterThreads) {
          const int vector = share.first + v;
          ++seen[vector];
          if (block_of(vector, vectors) != block || slot_of(vector, vectors) != v) return 3;
        }
      }
    }
    for (int count : seen) if (count != 1) return 4;
  }
  return row_fits(225288, 2) || row_fits(151937, 2) || row_fits(0, 2) ? 5 : 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
def test_a_cluster_reads_every_logit_once(tmp_path):
    """The index arithmetic of the row loss, run on the CPU: each vector of a row by one thread, in one slot, within the
    shared memory that a block has."""
    source = tmp_path / "emulation.cpp"
    source.write_text(EMULATION)
    program = tmp_path / "emulation"
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", "-o", program, source], check=True)
    assert subprocess.run([program], check=False).returncode == 0
