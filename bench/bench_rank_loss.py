"""The loss over token log-probabilities, with its gradient and statistics: (B, T) -> loss, d logps.

Reads logps, old and reference log-probabilities and the mask, writes the gradient: 17 bytes a token. The peer
is the same loss in PyTorch with autograd (the reference), eager and compiled. Bar: at least 10 times faster
on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from benchmarking import FULL, Arm, Case, bar, measure, record

from rlaif_fast import grpo_rank_loss
from rlaif_fast.loss import backends

SHAPES = [(64, 8, 512)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ARMS = ["triton kernel", "cpu kernel", "eager", "eager compiled"]
SECONDS = {"cpu": 6.0, "cuda": 3.0}


def build(shape: tuple[int, int, int], device: str) -> Case:
    N, G, T = shape
    B = N * G
    logps = -torch.rand(B, T, device=device) * 3
    old, ref = logps + 0.1 * torch.randn_like(logps), logps + 0.1 * torch.randn_like(logps)
    mask = torch.arange(T, device=device) < torch.randint(1, T + 1, (B, 1), device=device)
    ranks = torch.rand(N, G, device=device).argsort(-1)
    leaf = logps.requires_grad_()

    def step(backend: str) -> None:
        out = grpo_rank_loss(leaf, ranks, old_logps=old, ref_logps=ref, mask=mask, beta=0.04, backend=backend)
        torch.autograd.grad(out.loss, leaf)

    size = 17 * B * T
    arms = {
        f"{row.name} kernel": Arm(lambda name=row.name: step(name), bytes=size)
        for row in backends.rows("rank_loss")
        if row.name != "reference" and row.refuses(device, torch.float32, G) is None
    }
    arms["eager"] = Arm(lambda: step("reference"), bytes=size)
    if device == "cuda" or FULL:
        compiled = torch.compile(step)
        arms["eager compiled"] = Arm(lambda: compiled("reference"), bytes=size)
    return measure(arms, "eager", device, SECONDS[device])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_rank_loss(benchmark, arena, one_thread, device, shape, arm):
    case = arena.case(f"rank_loss {shape} {device}", lambda: build(shape, device))
    record(benchmark, case, arm, "rank_loss", "N={} G={} T={}".format(*shape), device)
    if arm == "triton kernel":
        ratio = case.ratio("eager", arm)
        bar(ratio >= 10.0, f"at least 10 times faster than eager, measured {ratio:.1f}")
