"""The gradient of the rank loss: its second launch, elementwise over the tokens.

    d loss / d logp_t = -w_i (sampling_ratio_t rho_t dJ_t/drho_t - beta dKL_t/dlogp_t)
    d loss / d H_t    = -w_i entropy_coef, or -entropy_coef / tokens

`rank_loss` says what the letters are and makes the launch before this one, which leaves the advantages and the
weights w_i; at sequence level also the slope of each response, the same for all its tokens. Never materialised:
ratios, KL. SPLITS programs share a response. Any float dtype in, float32 inside and out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast.loss.options import LossOptions
from rlaif_fast_kernels.token_terms import (
    importance_ratio,
    kl_and_surrogate,
    kl_term,
    load_float,
    policy_arguments,
    policy_slope,
)

SPLITS = 8  # programs a response


@triton.jit
def rank_loss_grad_kernel(
    logps,  # (B, T)
    old_logps,  # (B, T) or None
    ref_logps,  # (B, T) or None
    mask,  # (B, T) uint8 or None
    sampling_ratio,  # (B, T) or None
    valid,  # (N,) uint8 or None
    A,  # (B,) or, PER_TOKEN, (B, T)
    row_slopes,  # (B,), SEQUENCE only
    row_weights,  # (B,)
    entropy_weight,  # scalar, ENTROPY_TOKENS only
    grad_logps,  # (B, T) out
    grad_entropy,  # (B, T) out, or None
    G,
    T,
    low,
    high,
    delta,  # or None
    dual_clip,  # or None
    tau_pos,
    tau_neg,
    beta,
    kl_clamp,  # or None
    entropy_coef,
    KL: tl.constexpr,
    UNBIASED: tl.constexpr,
    SURROGATE: tl.constexpr,
    ENTROPY_TOKENS: tl.constexpr,
    SEQUENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counted = T if valid is None else tl.where(tl.load(valid + row // G) != 0, T, 0)
    weight = tl.load(row_weights + row)
    entropy_share = tl.load(entropy_weight) if ENTROPY_TOKENS else weight
    for t in tl.range(tl.program_id(1) * BLOCK_T, T, BLOCK_T * tl.num_programs(1)):
        offs_t = t + tl.arange(0, BLOCK_T)
        at = row * T + offs_t
        inside = offs_t < T
        live = offs_t < counted
        if mask is not None:
            live = live & (tl.load(mask + at, mask=live, other=0) != 0)
        logp = load_float(logps, at, live)
        log_ratio = logp - (logp if old_logps is None else load_float(old_logps, at, live))
        rho = importance_ratio(log_ratio)
        if SEQUENCE:
            slope = tl.load(row_slopes + row)
        else:
            A_t = load_float(A, at, live) if PER_TOKEN else tl.load(A + row).to(tl.float32)
            slope = policy_slope(
                log_ratio, rho, A_t, low, high, delta, dual_clip, tau_pos, tau_neg, SURROGATE
            )
            if sampling_ratio is not None:
                slope *= load_float(sampling_ratio, at, live)
        if ref_logps is not None:
            x = load_float(ref_logps, at, live) - logp
            _, kl_slope = kl_term(x, log_ratio, rho, kl_clamp, KL, UNBIASED)
            slope -= beta * kl_slope
        tl.store(grad_logps + at, tl.where(live, -weight * slope, 0.0), mask=inside)
        if grad_entropy is not None:
            tl.store(grad_entropy + at, tl.where(live, -entropy_share * entropy_coef, 0.0), mask=inside)


def write_gradient(
    tokens: list[Tensor | None],  # logps, old_logps, ref_logps, mask, sampling_ratio: (B, T) or None
    valid: Tensor | None,  # (N,) uint8
    A: Tensor,  # (B,), or (B, T) with per_token
    row_slopes: Tensor,  # (B,)
    row_weights: Tensor,  # (B,)
    entropy_weight: Tensor,  # scalar
    grad_logps: Tensor,  # (B, T) out
    grad_entropy: Tensor | None,  # (B, T) out
    G: int,
    beta: float,
    entropy_coef: float,
    per_token: bool,
    options: LossOptions,
    config: dict[str, int],  # of the launch before
) -> None:
    """Write the gradient of every token, 0 for those that do not count."""
    T, BLOCK_T = grad_logps.shape[-1], config["BLOCK_T"]
    splits = min(SPLITS, triton.cdiv(T, BLOCK_T))
    if splits:
        with torch.cuda.device_of(grad_logps):
            rank_loss_grad_kernel[(row_weights.numel(), splits)](
                *tokens,
                *(valid, A, row_slopes, row_weights, entropy_weight, grad_logps, grad_entropy),
                *(G, T),
                *policy_arguments(options),
                *(beta, options.kl_clamp, entropy_coef),
                **kl_and_surrogate(options),
                ENTROPY_TOKENS=options.entropy_aggregate == "tokens",
                SEQUENCE=options.per_sequence,
                PER_TOKEN=per_token,
                BLOCK_T=BLOCK_T,
                num_warps=config["num_warps"],
            )
