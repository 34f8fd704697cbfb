"""Hidden states to loss and the gradients of hidden and weight, entropy and KL on: M rows, H hidden, V
vocabulary.

The floor is three bare matmuls of that size, 6 M H V FLOPs: logits, d hidden, d weight. Bars on the CPU
(float32, one thread, M = 2048, H = 896, V = 32000, and small ones too): at most 1.10 times the floor and at most 300 MB
more memory, gradients included; on a GPU (8192, 3584, 152064): faster than every peer whose gradient is exact. Peak
memory of the floor counts its logits. Most peers do less than the whole loss; `peers.py` says what each lacks.
"""

from __future__ import annotations

import pytest
import torch
from benchmarking import FULL, Arm, Case, bar, cases_here, measure, record
from peers import COMPILED, HEADS, missing, peer_loss, token_loss
from torch import Tensor

from rlaif_fast import fused_linear_grpo_rank_loss
from rlaif_fast.loss import backends

CASES = {
    "cpu": [(32, 8, 8, 896, 32_000, torch.float32)],
    "cuda": [(8, 8, 128, 3584, 152_064, torch.bfloat16), (16, 8, 128, 2048, 151_936, torch.bfloat16)],
}
if FULL:
    CASES["cpu"].append((5, 8, 6, 512, 32_003, torch.float32))  # a small step, an odd vocabulary
ARMS = [
    "three matmuls",
    "triton kernel",
    "cuda kernel",
    "cpu kernel",
    "cpu kernel, on-policy",
    "eager",
    "eager compiled",
    "Liger chunked loss, no entropy",
    *(peer.label for peer in HEADS),
]
INEXACT = [peer.label for peer in HEADS if not peer.exact]
PARAMETERS = cases_here(CASES)
SECONDS = {"cpu": 90.0, "cuda": 12.0}
PEER_ROUNDS = {"cpu": 2, "cuda": 10}


def eager(
    hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor
) -> Tensor:
    """Head, log-softmax, gather, entropy and loss, with the logits materialised."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    logps = log_p.gather(-1, ids[..., None]).squeeze(-1)
    return token_loss(logps, -(log_p.exp() * log_p).sum(-1), old, ref, advantages)


def build(shape: tuple[int, int, int, int, int, torch.dtype], device: str) -> Case:
    N, G, T, H, V, dtype = shape
    B, M = N * G, N * G * T
    hidden = torch.randn(B, T, H, device=device, dtype=dtype).requires_grad_()
    weight = (H**-0.5 * torch.randn(V, H, device=device, dtype=dtype)).requires_grad_()
    ids = torch.randint(0, V, (B, T), device=device)
    old = torch.full((B, T), -10.9, device=device) + 0.1 * torch.randn(B, T, device=device)
    ref = old + 0.1 * torch.randn_like(old)
    ranks = torch.rand(N, G, device=device).argsort(-1)
    A = torch.randn(B, device=device)
    rows, head = hidden.detach().view(M, H), weight.detach()
    flops = 6 * M * H * V

    def three_matmuls() -> tuple[Tensor, Tensor]:
        logits = rows @ head.t()
        return logits @ head, logits.t() @ rows

    def fused(backend: str, old_logps: Tensor | None) -> None:
        out = fused_linear_grpo_rank_loss(
            hidden,
            weight,
            ids,
            ranks,
            old_logps=old_logps,
            ref_logps=ref,
            beta=0.04,
            entropy_coef=0.01,
            backend=backend,
        )
        torch.autograd.grad(out.loss, [hidden, weight])

    def peer(function) -> None:
        torch.autograd.grad(function(), [hidden, weight])

    few = PEER_ROUNDS[device]
    arms = {"three matmuls": Arm(three_matmuls, flops=flops)}
    for row in backends.rows("linear_loss"):
        if row.name != "reference" and row.refuses(device, dtype, G) is None:
            arms[f"{row.name} kernel"] = Arm(lambda name=row.name: fused(name, old), flops=flops)
    if device == "cpu":
        arms["cpu kernel, on-policy"] = Arm(lambda: fused("cpu", None), rounds=few, flops=flops)
    arms["eager"] = Arm(
        lambda: peer(lambda: eager(hidden, weight, ids, old, ref, A[:, None])), few, flops=flops
    )
    skipped = {"eager compiled": COMPILED}
    if device == "cuda" or FULL:
        compiled = torch.compile(eager)
        arms["eager compiled"] = Arm(
            lambda: peer(lambda: compiled(hidden, weight, ids, old, ref, A[:, None])), few, flops=flops
        )
    reason = missing("liger-kernel", "liger_kernel.chunked_loss")
    if reason is not None:
        skipped["Liger chunked loss, no entropy"] = reason
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.04,
            compiled=device == "cuda" or FULL,
            use_ref_model=True,
            loss_type="grpo",
            chunk_size=max(1, 256 // T),
        )
        mask = torch.ones(B, T, device=device)

        def liger() -> Tensor:
            return loss(hidden, weight, ids, mask, A, ref_per_token_logps=ref, old_per_token_logps=old)[0]

        arms["Liger chunked loss, no entropy"] = Arm(lambda: peer(liger), few, flops=flops)
    for found in HEADS:
        reason = found.refuses(device, dtype)
        if reason is None and device == "cpu" and found.hopper and not FULL:
            reason = "on a CPU a plain fallback of many seconds; RLAIF_FAST_BENCH=full runs it"
        if reason is not None:
            skipped[found.label] = reason
            continue

        def head_peer(found=found) -> Tensor:
            return peer_loss(found(hidden.view(M, H), weight, ids.view(M)), old, ref, A[:, None])

        arms[found.label] = Arm(
            lambda run=head_peer: peer(run), few, flops=flops + 2 * (found.matmuls - 3) * M * H * V
        )
    return measure(arms, "three matmuls", device, SECONDS[device], skipped)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("device", "shape"), PARAMETERS, ids=str)
def test_linear_loss(benchmark, arena, one_thread, device, shape, arm):
    N, G, T, H, V, dtype = shape
    case = arena.case(f"linear_loss {shape} {device}", lambda: build(shape, device))
    record(benchmark, case, arm, "linear_loss", f"M={N * G * T} H={H} V={V} {str(dtype)[6:]}", device)
    if arm == "cpu kernel":
        ratio, peak = case.ratio(arm, "three matmuls"), case.results[arm].peak_bytes
        bar(ratio <= 1.10, f"at most 1.10 times three matmuls, measured {ratio:.3f}")
        bar(peak <= 300e6, f"at most 300 MB more memory, measured {peak / 1e6:.0f} MB")
    if arm == "triton kernel":
        peers = [name for name in case.results if name not in ("three matmuls", arm, *INEXACT)]
        slower = {name: round(case.ratio(name, arm), 3) for name in peers}
        bar(all(ratio > 1.0 for ratio in slower.values()), f"faster than every peer, measured {slower}")
