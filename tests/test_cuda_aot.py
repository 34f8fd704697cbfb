"""Every .cu file compiles for every target architecture, without register spills.

No GPU is needed: nvcc compiles to machine code and ptxas reports registers, stack and spills. A CPU build of
PyTorch ships the CUDA headers but for one generated file, for which a stand-in defines what it says of a
shared build.
"""

from __future__ import annotations

import math
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

// Of a block on compute capability 9.0 and 10.0, on 12.0, and what leaves nothing for a row.
constexpr int kLarge = 227 * 1024, kSmall = 99 * 1024, kNone = kOtherSharedBytes;

int dealt(long long V, int shared_bytes) {
  if (!row_fits(V, shared_bytes, 2)) return 1;
  const int vectors = static_cast<int>(V / 8);
  std::vector<int> seen(vectors);
  for (int block = 0; block < kClusterBlocks; ++block) {
    const Share share = share_of(block, vectors);
    if (share.count * kVectorBytes + kOtherSharedBytes > shared_bytes) return 2;
    if (share.count > share_of(0, vectors).count) return 3;
    for (int thread = 0; thread < kClusterThreads; ++thread) {
      for (int v = thread; v < share.count; v += kClusterThreads) {
        const int vector = share.first + v;
        ++seen[vector];
        if (block_of(vector, vectors) != block || slot_of(vector, vectors) != v) return 4;
      }
    }
  }
  for (int count : seen) if (count != 1) return 5;
  return 0;
}

// Prints log-probability of logit 0 and entropy, in units of log 2, as a thread and a merge make them.
void statistics(float offset, float scale) {
  const float x[] = {offset + 1.5f, offset, offset + 0.25f, offset - 2.f, -INFINITY, offset + 1.f};
  Stats half[2] = {{kFloor, 0, 0}, {kFloor, 0, 0}};
  for (int i = 0; i < 6; ++i) {
    Stats& own = half[i / 3];
    own = raised(own, fmaxf(own.m, x[i]), scale);
    take(own, x[i], scale);
  }
  const Stats all = merge(merge(half[0], half[1], scale), {kFloor, 0, 0}, scale);
  const float log_total = log2f(all.s);
  std::printf("%.9g %.9g\\n", (x[0] - all.m) * scale - log_total, log_total - all.w / all.s);
}

int main() {
  for (long long V : {8LL, 16LL, 24LL, 8192LL, 8200LL, 16400LL, 32000LL, 151936LL, 152064LL, 225280LL}) {
    if (const int wrong = dealt(V, kLarge)) return wrong;
  }
  for (long long V : {8LL, 32000LL, 94208LL}) {
    if (const int wrong = dealt(V, kSmall)) return wrong;
  }
  if (row_fits(225288, kLarge, 2) || row_fits(94216, kSmall, 2) || row_fits(8, kNone, 2)) return 6;
  if (row_fits(151937, kLarge, 2) || row_fits(0, kLarge, 2)) return 7;
  for (float offset : {0.f, 1000.f, -1000.f}) {
    for (float scale : {1.f, 1.44269504f, 1000.f}) statistics(offset, scale);
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """What the arithmetic of the row loss says, run on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    program = tmp_path_factory.mktemp("emulation") / "emulation"
    source = program.with_suffix(".cpp")
    source.write_text(EMULATION)
    subprocess.run(["g++", "-std=c++17", f"-I{ROOT / 'csrc'}", "-o", program, source], check=True)
    return subprocess.run([program], check=False, capture_output=True, text=True)


def test_a_cluster_reads_every_logit_once(emulated):
    """Each vector of a row by one thread, in one slot, within the shared memory that a block has on its device."""
    assert emulated.returncode == 0


def test_statistics_of_large_logits_are_those_of_small_ones(emulated):
    """Whatever is added to all logits, and however they are scaled, one of them -inf."""
    logits = torch.tensor([1.5, 0, 0.25, -2, -torch.inf, 1], dtype=torch.float64)
    found = [list(map(float, line.split())) for line in emulated.stdout.splitlines()]
    assert len(found) == 9
    for place, (logp, entropy) in enumerate(found):
        log_p = (logits * [1.0, 1.44269504, 1000.0][place % 3]).mul(math.log(2)).log_softmax(0)
        expected = -(log_p.exp() * log_p.masked_fill(log_p.exp() == 0, 0)).sum()
        assert logp * math.log(2) == pytest.approx(log_p[0].item(), abs=2e-7)
        assert entropy * math.log(2) == pytest.approx(expected.item(), abs=2e-7)
