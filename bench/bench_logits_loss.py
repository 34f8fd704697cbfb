"""Logits to loss and their gradient, entropy and KL on: (B, T, V) -> loss, d logits.

Reads the logits, and once more to write the gradient: 3 times their size is the floor with separate forward
and backward. The floor arm copies the logits and reads them, which is that traffic. Bars: on the CPU at least
3 times faster than eager log_softmax + gather + entropy + autograd at 2048 rows and V = 32000, and no extra
copy of the logits (except the gradient itself, and in place not even that); on a GPU at most 1.25 times the floor.
"""

from __future__ import annotations

import pytest
import torch
from benchmarking import FULL, Arm, Case, bar, cases_here, measure, record
from peers import COMPILED, LOGITS, missing, peer_loss, token_loss
from torch import Tensor

from rlaif_fast import grpo_rank_loss_from_logits
from rlaif_fast.loss import backends

CASES = {
    "cpu": [(32, 8, 8, 32_000, torch.float32)],
    "cuda": [(16, 8, 128, 152_064, torch.bfloat16)],
}
ARMS = [
    "traffic",
    "triton kernel",
    "triton kernel in place",
    "cpu kernel",
    "cpu kernel in place",
    "eager",
    "eager compiled",
    "Liger triton_grpo_loss, no entropy",
    *(peer.label for peer in LOGITS),
]
PARAMETERS = cases_here(CASES)
SECONDS = {"cpu": 40.0, "cuda": 10.0}


def eager(logits: Tensor, ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """The loss as a trainer writes it."""
    log_p = logits.float().log_softmax(-1)
    logps = log_p.gather(-1, ids[..., None]).squeeze(-1)
    return token_loss(logps, -(log_p.exp() * log_p).sum(-1), old, ref, advantages)


def build(shape: tuple[int, int, int, int, torch.dtype], device: str) -> Case:
    N, G, T, V, dtype = shape
    B = N * G
    logits = (3 * torch.randn(B, T, V, device=device, dtype=dtype)).requires_grad_()
    ids = torch.randint(0, V, (B, T), device=device)
    old = torch.full((B, T), -9.0, device=device) + 0.1 * torch.randn(B, T, device=device)
    ref = old + 0.1 * torch.randn_like(old)
    A = torch.randn(B, device=device)
    size = 3 * logits.numel() * logits.element_size()
    spare = torch.empty_like(logits, requires_grad=False) if device == "cuda" else None

    def traffic() -> None:
        (logits.detach().clone() if spare is None else spare.copy_(logits.detach())).view(-1)
        logits.detach().amax()

    def step(backend: str, inplace: bool = False) -> None:
        x = logits
        # the logits are a fresh output of the model each step; here they hold gradients after the first
        if inplace:
            x = logits.detach().requires_grad_()
        out = grpo_rank_loss_from_logits(
            x,
            ids,
            advantages=A,
            old_logps=old,
            ref_logps=ref,
            beta=0.04,
            entropy_coef=0.01,
            inplace_backward=inplace,
            backend=backend,
        )
        torch.autograd.grad(out.loss, x)

    def peer(function) -> None:
        torch.autograd.grad(function(), logits)

    arms = {"traffic": Arm(traffic, bytes=size)}
    names = [
        row.name
        for row in backends.rows("logits_loss")
        if row.name != "reference" and row.refuses(device, dtype, None) is None
    ]
    for name in names:
        arms[f"{name} kernel"] = Arm(lambda name=name: step(name), bytes=size)
    arms["eager"] = Arm(lambda: peer(lambda: eager(logits, ids, old, ref, A[:, None])), rounds=5, bytes=size)
    skipped = {"eager compiled": COMPILED}
    if device == "cuda" or FULL:
        compiled = torch.compile(eager)
        arms["eager compiled"] = Arm(
            lambda: peer(lambda: compiled(logits, ids, old, ref, A[:, None])), bytes=size
        )
    liger_module = "liger_kernel.transformers.grpo_loss"
    reason = "needs a GPU" if device == "cpu" else missing("liger-kernel", liger_module)
    if reason is not None:
        skipped["Liger triton_grpo_loss, no entropy"] = reason
    else:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        def liger() -> Tensor:  # takes one more position than there are tokens
            padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
            loss, _, _ = triton_grpo_loss(
                padded, old, ref, ids, A, temperature=1.0, eps_high=0.2, inplace=False
            )
            return loss.mean()

        arms["Liger triton_grpo_loss, no entropy"] = Arm(lambda: peer(liger), rounds=10, bytes=size)
    for found in LOGITS:
        reason = found.refuses(device, dtype)
        if reason is not None:
            skipped[found.label] = reason
            continue

        def logits_peer(found=found) -> Tensor:
            return peer_loss(found(logits, ids), old, ref, A[:, None])

        arms[found.label] = Arm(lambda run=logits_peer: peer(run), rounds=10, bytes=size)
    for name in names:  # last: the logits hold their gradient afterwards
        arms[f"{name} kernel in place"] = Arm(lambda name=name: step(name, inplace=True), bytes=size)
    return measure(arms, "traffic", device, SECONDS[device], skipped)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("device", "shape"), PARAMETERS, ids=str)
def test_logits_loss(benchmark, arena, one_thread, device, shape, arm):
    N, G, T, V, dtype = shape
    case = arena.case(f"logits_loss {shape} {device}", lambda: build(shape, device))
    record(benchmark, case, arm, "logits_loss", f"rows={N * G * T} V={V} {str(dtype)[6:]}", device)
    one_copy = N * G * T * V * dtype.itemsize
    if arm == "cpu kernel":
        ratio = case.ratio("eager", arm)
        bar(ratio >= 3.0, f"at least 3 times faster than eager, measured {ratio:.2f}")
        assert case.results[arm].peak_bytes <= 1.05 * one_copy  # the gradient
    if arm == "cpu kernel in place":
        assert case.results[arm].peak_bytes <= 0.05 * one_copy
    if arm == "triton kernel":
        ratio = case.ratio(arm, "traffic")
        bar(ratio <= 1.25, f"at most 1.25 times the traffic floor, measured {ratio:.3f}")
