"""Ranks to advantages: scores and oracle ranks (N, G) -> penalties, advantages, nDCG, Kendall tau-b.

The peer is what a trainer writes in PyTorch, without ties and statistics: two argsorts, gathers of a gain
table, and arithmetic; it does less work. Reads and writes 4 (N, G) float32 matrices. Bar: at least 5 times
faster than it on the CPU and 10 times on a GPU at (65536, 8) and (4096, 64).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlaif_fast import backends, rank_advantages
from rlaif_fast.benchmarking import Arm, Case, measure, record

SHAPES = [(65_536, 8), (4096, 64)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ARMS = ["cuda kernel", "triton kernel", "cpu kernel", "reference", "eager argsort", "eager argsort compiled"]
BAR = {"cpu": 5.0, "cuda": 10.0}
SECONDS = {"cpu": 6.0, "cuda": 3.0}


def eager_argsort(
    scores: Tensor, oracle_ranks: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:  # (N, G), (G,)
    """The directed advantage as written with two argsorts; ties go by position."""
    u = gain[oracle_ranks.argsort(-1).argsort(-1)]
    v = gain[scores.argsort(-1, descending=True).argsort(-1)]
    penalty = 1 - torch.minimum(u, v) / torch.maximum(u, v)
    a = (u - u.mean(-1, keepdim=True)) * (1 + penalty)
    return a - a.mean(-1, keepdim=True), penalty


def build(shape: tuple[int, int], device: str) -> Case:
    N, G = shape
    scores = torch.randn(N, G, device=device)
    ranks = torch.rand(N, G, device=device).argsort(-1).float()
    k = torch.arange(G, device=device)
    gain = 1 / ((1 + k) * torch.log2(2.0 + k))
    size = 4 * N * G * 4
    arms = {
        f"{row.name} kernel": Arm(
            lambda name=row.name: rank_advantages(scores, ranks, backend=name), bytes=size
        )
        for row in backends.rows("rank_penalty")
        if row.name != "reference" and row.refuses(device, torch.float32, G) is None
    }
    arms["reference"] = Arm(lambda: rank_advantages(scores, ranks, backend="reference"), rounds=5, bytes=size)
    arms["eager argsort"] = Arm(lambda: eager_argsort(scores, ranks, gain), bytes=size)
    if device == "cuda":
        compiled = torch.compile(eager_argsort)
        arms["eager argsort compiled"] = Arm(lambda: compiled(scores, ranks, gain), bytes=size)
    return measure(arms, "eager argsort", device, SECONDS[device])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rank_penalty(benchmark, arena, one_thread, device, shape, arm):
    case = arena.case(f"rank_penalty {shape} {device}", lambda: build(shape, device))
    record(benchmark, case, arm, "rank_penalty", f"N={shape[0]} G={shape[1]}", device)
    if arm in ("cpu kernel", "cuda kernel") and arm.startswith(device):
        assert case.ratio("eager argsort", arm) >= BAR[device]
