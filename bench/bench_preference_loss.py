"""The DPO loss from hidden states, with the gradients of hidden and weight: P pairs of T tokens, M = 2 P T rows, H
hidden, V vocabulary.

The floor is three bare matmuls of that size. Bars: faster than both peers, on the CPU at most 300 MB more memory, and
at M = 2048 (`RLAIF_FAST_BENCH=full`) at most 1.10 times the floor, as in `bench_linear_loss.py`. The log-probabilities
of the reference are given; Liger would run its own reference head, so it is told that there is none. TRL's arm does
what its `DPOTrainer` does: logits, `selective_log_softmax`, the loss.
"""

from __future__ import annotations

import pytest
import torch
from benchmarking import FULL, Arm, Case, bar, cases_here, measure, record
from peers import missing
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlaif_fast import fused_linear_dpo_loss
from rlaif_fast.loss import backends

BETA = 0.1
CASES = {
    "cpu": [(128 if FULL else 32, 8, 896, 32_000, torch.float32)],
    "cuda": [(32, 128, 3584, 152_064, torch.bfloat16)],
}
ARMS = ["three matmuls", "triton kernel", "cpu kernel", "TRL, logits kept", "Liger chunked DPO"]
PARAMETERS = cases_here(CASES)
SECONDS = {"cpu": 15.0, "cuda": 12.0}
PEER_ROUNDS = {"cpu": 3, "cuda": 10}


def liger_dpo(device: str, chunk_size: int) -> torch.nn.Module:
    """Liger's loss with no reference model, whose log-probabilities then count as 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=False, compiled=device == "cuda", chunk_size=chunk_size
    )


def halves(x: Tensor) -> Tensor:
    """Pairs as Liger and TRL hold them: all chosen responses, then all rejected ones."""
    return torch.cat((x[0::2], x[1::2]))


def build(shape: tuple[int, int, int, int, torch.dtype], device: str) -> Case:
    P, T, H, V, dtype = shape
    B, M = 2 * P, 2 * P * T
    hidden = torch.randn(B, T, H, device=device, dtype=dtype).requires_grad_()
    weight = (H**-0.5 * torch.randn(V, H, device=device, dtype=dtype)).requires_grad_()
    ids = torch.randint(0, V, (B, T), device=device)
    no_reference = torch.zeros(B, device=device)
    rows, head = hidden.detach().view(M, H), weight.detach()
    flops = 6 * M * H * V

    def three_matmuls() -> tuple[Tensor, Tensor]:
        logits = rows @ head.t()
        return logits @ head, logits.t() @ rows

    def fused(backend: str) -> None:
        out = fused_linear_dpo_loss(
            hidden, weight, ids, ref_logps_sum=no_reference, beta=BETA, backend=backend
        )
        torch.autograd.grad(out.loss, [hidden, weight])

    arms = {"three matmuls": Arm(three_matmuls, flops=flops)}
    for row in backends.rows("linear_loss"):
        if f"{row.name} kernel" in ARMS and row.refuses(device, dtype, 2) is None:
            arms[f"{row.name} kernel"] = Arm(lambda name=row.name: fused(name), flops=flops)
    skipped = {}
    few = PEER_ROUNDS[device]
    if (reason := missing("trl", "trl.trainer.utils")) is not None:
        skipped["TRL, logits kept"] = reason
    else:
        from trl.trainer.utils import selective_log_softmax

        def trl() -> None:
            sums = selective_log_softmax(hidden @ weight.t(), ids).sum(-1)
            loss = -logsigmoid(BETA * (sums[0::2] - sums[1::2])).mean()
            torch.autograd.grad(loss, [hidden, weight])

        arms["TRL, logits kept"] = Arm(trl, few, flops=flops)
    if (reason := missing("liger-kernel", "liger_kernel.chunked_loss")) is not None:
        skipped["Liger chunked DPO"] = reason
    else:
        loss = liger_dpo(device, chunk_size=max(1, 256 // T))
        inputs, targets = halves(hidden.detach()).requires_grad_(), halves(ids)

        def liger() -> None:
            torch.autograd.grad(loss(weight, inputs, targets)[0], [inputs, weight])

        arms["Liger chunked DPO"] = Arm(liger, few, flops=flops)
    return measure(arms, "three matmuls", device, SECONDS[device], skipped)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("device", "shape"), PARAMETERS, ids=str)
def test_preference_loss(benchmark, arena, one_thread, device, shape, arm):
    P, T, H, V, dtype = shape
    case = arena.case(f"preference_loss {shape} {device}", lambda: build(shape, device))
    record(benchmark, case, arm, "preference_loss", f"M={2 * P * T} H={H} V={V} {str(dtype)[6:]}", device)
    if arm not in ("cpu kernel", "triton kernel"):
        return
    if arm == "cpu kernel":
        ratio, peak = case.ratio(arm, "three matmuls"), case.results[arm].peak_bytes
        if FULL:
            bar(ratio <= 1.10, f"at most 1.10 times three matmuls, measured {ratio:.3f}")
        bar(peak <= 300e6, f"at most 300 MB more memory, measured {peak / 1e6:.0f} MB")
    peers = {name: round(case.ratio(name, arm), 3) for name in ARMS[3:] if name in case.results}
    bar(all(ratio > 1.0 for ratio in peers.values()), f"faster than every peer, measured {peers}")
