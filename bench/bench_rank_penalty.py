"""Ranks to advantages: scores and oracle ranks (N, G) -> penalties, advantages, nDCG, Kendall tau-b.

The peer is what a trainer writes in PyTorch: two argsorts, gathers of the tables, arithmetic, and the
pairwise signs of Kendall's tau; it breaks ties by position, which is less work. "advantages only" leaves nDCG, tau
and top-1 out. Reads and writes 4 (N, G) float32 matrices. Bar: at least 5 times faster than the peer with the
same outputs on the CPU and 10 times on a GPU, at (65536, 8) and (4096, 64).
"""

from __future__ import annotations

import pytest
import torch
from benchmarking import Arm, Case, bar, measure, record
from torch import Tensor

from rlaif_fast import rank_advantages
from rlaif_fast.loss import backends

SHAPES = [(65_536, 8), (4096, 64)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ARMS = [
    "cuda kernel",
    "triton kernel",
    "cpu kernel",
    "reference",
    "eager",
    "eager compiled",
    "eager, advantages only",
]
BAR = {"cpu": 5.0, "cuda": 10.0}
SECONDS = {"cpu": 6.0, "cuda": 3.0}


def eager_argsort(
    scores: Tensor,  # (N, G)
    oracle_ranks: Tensor,  # (N, G)
    gain: Tensor,  # (G,)
    statistics: bool,
) -> tuple[Tensor, ...]:
    """The directed advantage written with two argsorts; ties are broken by position."""
    oracle_at = oracle_ranks.argsort(-1).argsort(-1)
    policy_at = scores.argsort(-1, descending=True).argsort(-1)
    u, v = gain[oracle_at], gain[policy_at]
    penalty = 1 - torch.minimum(u, v) / torch.maximum(u, v)
    a = (u - u.mean(-1, keepdim=True)) * (1 + penalty)
    advantages = a - a.mean(-1, keepdim=True)
    if not statistics:
        return advantages, penalty
    relevance, discount = 1.0 / (1 + oracle_at), 1 / torch.log2(2.0 + policy_at)
    ndcg = (relevance * discount).sum(-1) / gain.sum()
    signs = [torch.sign(x[:, :, None] - x[:, None, :]) for x in (oracle_ranks, -scores)]
    untied = signs[0].square().sum((-1, -2)) * signs[1].square().sum((-1, -2))
    tau = (signs[0] * signs[1]).sum((-1, -2)) / untied.sqrt()
    top1 = ((oracle_at == 0) & (policy_at == 0)).any(-1)
    has_signal = (oracle_ranks != oracle_ranks[:, :1]).any(-1)
    return advantages, penalty, ndcg, tau, top1, has_signal


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
    arms["eager"] = Arm(lambda: eager_argsort(scores, ranks, gain, True), bytes=size)
    arms["eager, advantages only"] = Arm(lambda: eager_argsort(scores, ranks, gain, False), bytes=size)
    if device == "cuda":
        compiled = torch.compile(eager_argsort)
        arms["eager compiled"] = Arm(lambda: compiled(scores, ranks, gain, True), bytes=size)
    return measure(arms, "eager", device, SECONDS[device])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rank_penalty(benchmark, arena, one_thread, device, shape, arm):
    case = arena.case(f"rank_penalty {shape} {device}", lambda: build(shape, device))
    record(benchmark, case, arm, "rank_penalty", f"N={shape[0]} G={shape[1]}", device)
    if arm in ("cpu kernel", "cuda kernel") and arm.startswith(device):
        ratio = case.ratio("eager", arm)
        bar(ratio >= BAR[device], f"at least {BAR[device]} times faster than eager, measured {ratio:.1f}")
