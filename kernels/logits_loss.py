"""Rows of logits to log-probability, entropy and loss, and to their gradient: the vocabulary is swept online.

    z = scale logits / temperature, or c tanh(scale logits / c) / temperature where a cap c bounds them
    lse = logsumexp z,   p = softmax z,   logp = z_y - lse,   H = lse - sum p z
    d logp / d z_v = [v = y] - p_v,             d H / d z_v = -p_v (log p_v + H)
    d loss / d logits_v = (g ([v = y] - p_v) - h p_v (log p_v + H)) dz_v / dlogits_v
                          with g = d loss / d logp, h = d loss / d H

    row_stats   logits -> logp, lse, H             reads each logit once
    row_grad    logits, lse, H, g, h -> gradient   reads and writes each once, in place or not
    row_loss    logits -> all of it, in place      one launch: where A is known beforehand, g follows from
                                                   logp while the row is still in the L2 cache

One program takes one row, read and written by the device functions of `row_sweep`. Never materialised:
softmax, log-softmax, a float32 copy. Any float dtype in, float32 inside, statistics float32.
A row of weight 0 is not read. An id outside [0, V) is not read through: its logp is NaN, lse and H are right.

Letters: M rows, V vocabulary; logits are (M, V) or (B, T, V) with M = B * T, the last stride 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast.loss.inputs import RowInputs, RowStats, Scaling
from rlaif_fast.loss.options import LossOptions
from rlaif_fast_kernels.launch import AotConfig, refuse, unavailable
from rlaif_fast_kernels.row_sweep import LN2, LOG2E, row_of, sweep, write_grad
from rlaif_fast_kernels.token_terms import (
    importance_ratio,
    kl_and_surrogate,
    kl_term,
    policy_arguments,
    policy_slope,
)

__all__ = ["aot_configs", "row_grad", "row_loss", "row_stats", "supports", "unavailable"]

# Bytes of a row in flight. Two programs an SM where the row passes through once; one where it has to stay
# in the L2 cache until it is written.
STREAM_BLOCK = 16384
RESIDENT_BLOCK = 32768
THREAD_BYTES = 32  # of a block: two accesses in flight


def launch_config(V: int, element_size: int, block: int) -> dict[str, int]:
    """Accesses of 16 bytes; `block` is in bytes."""
    VEC = 16 // element_size
    BLOCK_V = min(block // element_size, max(8 * VEC, triton.next_power_of_2(V)))
    num_warps = max(1, BLOCK_V * element_size // (32 * THREAD_BYTES))
    return {"VEC": VEC, "BLOCK_V": BLOCK_V, "num_warps": num_warps, "num_stages": 1}


@triton.jit
def row_stats_kernel(
    logits,  # (B, T, V)
    token_ids,  # (M,)
    logps,  # (M,) out
    lse,  # (M,) out
    entropy,  # (M,) out
    T,
    V,
    stride_b,
    stride_t,
    inv_temperature,  # 1 / temperature, times the scale where there is no cap
    temperatures,  # (M,) or None: divide by them
    inner,  # scale / cap
    cap,  # or None
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(token_ids + row)
    inv = inv_temperature if temperatures is None else inv_temperature / tl.load(temperatures + row)
    x = row_of(logits, row, T, stride_b, stride_t)
    lse2, logp, H = sweep(x, V, y, inv * LOG2E, inner, cap, VEC, BLOCK_V)
    tl.store(logps + row, logp)
    tl.store(lse + row, lse2 * LN2)
    tl.store(entropy + row, H)


@triton.jit
def row_grad_kernel(
    logits,  # (B, T, V)
    token_ids,  # (M,)
    lse,  # (M,)
    entropy,  # (M,)
    grad_logps,  # (M,)
    grad_entropy,  # (M,) or None
    out,  # (B, T, V) out; may be logits
    T,
    V,
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    inv_temperature,  # 1 / temperature, times the scale where there is no cap
    temperatures,  # (M,) or None: divide by them
    inner,  # scale / cap
    cap,  # or None
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(token_ids + row)
    h = 0.0 if grad_entropy is None else tl.load(grad_entropy + row)
    inv = inv_temperature if temperatures is None else inv_temperature / tl.load(temperatures + row)
    write_grad(
        row_of(logits, row, T, stride_b, stride_t), row_of(out, row, T, out_stride_b, out_stride_t), V, y,
        inv * LOG2E, inner, cap, inv, tl.load(lse + row) * LOG2E, tl.load(entropy + row),
        tl.load(grad_logps + row), h, VEC, BLOCK_V,
    )  # fmt: skip


@triton.jit
def row_loss_kernel(
    logits,  # (B, T, V); the gradient out
    token_ids,  # (M,)
    advantages,  # (M,)
    weights,  # (M,)
    old_logps,  # (M,) or None
    ref_logps,  # (M,) or None
    sampling_ratio,  # (M,) or None
    entropy_weights,  # (M,) or None: weights
    logps,  # (M,) out
    lse,  # (M,) out
    entropy,  # (M,) out
    grad_logps,  # (M,) out
    grad_entropy,  # (M,) out
    T,
    V,
    stride_b,
    stride_t,
    inv_temperature,  # 1 / temperature, times the scale where there is no cap
    temperatures,  # (M,) or None: divide by them
    inner,  # scale / cap
    cap,  # or None
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
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = row_of(logits, row, T, stride_b, stride_t)
    y = tl.load(token_ids + row)
    weight = tl.load(weights + row).to(tl.float32)
    inv = inv_temperature if temperatures is None else inv_temperature / tl.load(temperatures + row)
    scale = inv * LOG2E
    lse2, logp, H, g = 0.0, 0.0, 0.0, 0.0
    if weight != 0:
        lse2, logp, H = sweep(x, V, y, scale, inner, cap, VEC, BLOCK_V)
        log_ratio = logp - (logp if old_logps is None else tl.load(old_logps + row).to(tl.float32))
        A = tl.load(advantages + row).to(tl.float32)
        rho = importance_ratio(log_ratio)
        slope = policy_slope(log_ratio, rho, A, low, high, delta, dual_clip, tau_pos, tau_neg, SURROGATE)
        if sampling_ratio is not None:
            slope *= tl.load(sampling_ratio + row).to(tl.float32)
        if ref_logps is not None:
            x_ref = tl.load(ref_logps + row).to(tl.float32) - logp
            _, kl_slope = kl_term(x_ref, log_ratio, rho, kl_clamp, KL, UNBIASED)
            slope -= beta * kl_slope
        g = -weight * slope
    else:
        y = tl.minimum(tl.maximum(y, 0), V - 1)  # masked: whatever the id, the gradient is 0
    h = -entropy_coef * (weight if entropy_weights is None else tl.load(entropy_weights + row).to(tl.float32))
    tl.store(logps + row, logp)
    tl.store(lse + row, lse2 * LN2)
    tl.store(entropy + row, H)
    tl.store(grad_logps + row, g)
    tl.store(grad_entropy + row, h)
    tl.debug_barrier()  # no thread writes before every thread has read z_y
    write_grad(x, x, V, y, scale, inner, cap, inv, lse2, H, g, h, VEC, BLOCK_V)


def _scaling_arguments(scaling: Scaling) -> tuple[float | Tensor | None, ...]:
    """Return inv_temperature, temperatures, inner and cap as the kernels take them."""
    temperatures, cap = scaling.temperatures, scaling.softcap
    inv = scaling.factor / (scaling.temperature if temperatures is None else 1.0)
    flat = None if temperatures is None else temperatures.float().reshape(-1).contiguous()
    return inv, flat, 0.0 if cap is None else scaling.logit_scale / cap, cap


def _rows(
    logits: Tensor,  # (..., V)
) -> tuple[Tensor, int, int, int, int, int]:
    """Return the logits as (M, V) or (B, T, V), the last stride 1; M, T, V; the strides of B and T."""
    V = logits.shape[-1]
    if logits.stride(-1) != 1 and V > 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        logits = logits[None]
    elif logits.dim() > 3:
        logits = logits.reshape(-1, logits.shape[-2], V)
    if logits.dim() == 2:
        return logits, logits.shape[0], 1, V, logits.stride(0), 0
    B, T, _ = logits.shape
    return logits, B * T, T, V, logits.stride(0), logits.stride(1)


def row_stats(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (M,)
    scaling: Scaling,
) -> RowStats:
    """Return log-probability, logsumexp and entropy of each row; the logits are left alone."""
    logits, M, T, V, stride_b, stride_t = _rows(logits)
    stats = RowStats(*(torch.empty(M, dtype=torch.float32, device=logits.device) for _ in range(3)))
    if M:
        with torch.cuda.device_of(logits):
            row_stats_kernel[(M,)](
                logits,
                token_ids.contiguous(),
                *(stats.logps, stats.lse, stats.entropy),
                *(T, V, stride_b, stride_t),
                *_scaling_arguments(scaling),
                **launch_config(V, logits.element_size(), STREAM_BLOCK),
            )
    return stats


def row_grad(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (M,)
    scaling: Scaling,
    stats: RowStats,
    grad_logps: Tensor,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    out: Tensor,  # like logits; may be logits
) -> None:
    """Write grad_logps * dlogp/dlogits + grad_entropy * dentropy/dlogits."""
    logits, M, T, V, stride_b, stride_t = _rows(logits)
    to, _, _, _, out_stride_b, out_stride_t = _rows(out)
    assert to.shape == logits.shape and to.data_ptr() == out.data_ptr()  # a view: written through
    if M:
        with torch.cuda.device_of(logits):
            row_grad_kernel[(M,)](
                logits,
                token_ids.contiguous(),
                *(stats.lse, stats.entropy),
                grad_logps.contiguous(),
                None if grad_entropy is None else grad_entropy.contiguous(),
                out,
                *(T, V, stride_b, stride_t, out_stride_b, out_stride_t),
                *_scaling_arguments(scaling),
                **launch_config(V, logits.element_size(), STREAM_BLOCK),
            )


def row_loss(
    logits: Tensor,  # (..., V); overwritten by the gradient
    token_ids: Tensor,  # (M,)
    scaling: Scaling,
    rows: RowInputs,
    options: LossOptions,
) -> tuple[RowStats, Tensor, Tensor]:
    """Return statistics, grad_logps and grad_entropy (M,) of each row; the gradient replaces the logits."""
    x, M, T, V, stride_b, stride_t = _rows(logits)
    assert x.data_ptr() == logits.data_ptr()  # a view: written through
    results = torch.empty((5, M), dtype=torch.float32, device=logits.device)
    if M:
        given = [None if x is None else x.contiguous() for x in rows]
        with torch.cuda.device_of(logits):
            row_loss_kernel[(M,)](
                logits,
                token_ids.contiguous(),
                *given,
                *results,
                *(T, V, stride_b, stride_t),
                *_scaling_arguments(scaling),
                *policy_arguments(options),
                *(options.beta, options.kl_clamp, options.entropy_coef),
                **kl_and_surrogate(options),
                **launch_config(V, logits.element_size(), RESIDENT_BLOCK),
            )
    logps, lse, entropy, grad_logps, grad_entropy = results
    return RowStats(logps, lse, entropy), grad_logps, grad_entropy


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why the kernels cannot take such logits, or None."""
    return refuse("logits", device_type, dtype)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles."""
    outputs = ("logps", "lse", "entropy", "grad_logps", "grad_entropy")
    types = dict.fromkeys((*outputs, "advantages", "weights", "old_logps", "ref_logps"), "*fp32:16")
    types |= {"token_ids": "*i64:16", "T": "i32", "stride_b": "i64:16", "stride_t": "i32:16"}
    types |= {"out_stride_b": "i64:16", "out_stride_t": "i32:16"}
    types |= dict.fromkeys(
        ("inv_temperature", "inner", "low", "high", "tau_pos", "tau_neg", "beta", "entropy_coef"), "fp32"
    )
    names = ("sampling_ratio", "entropy_weights", "delta", "dual_clip", "kl_clamp", "temperatures", "cap")
    absent = dict.fromkeys(names) | {"KL": "k3", "UNBIASED": False, "SURROGATE": "clip"}
    cases = [
        (row_stats_kernel, "bf16", 152064, STREAM_BLOCK),
        (row_grad_kernel, "bf16", 152064, STREAM_BLOCK),
        (row_loss_kernel, "bf16", 152064, RESIDENT_BLOCK),
        (row_loss_kernel, "fp32", 32000, RESIDENT_BLOCK),
    ]
    configs = []
    for kernel, dtype, V, block in cases:
        launch = launch_config(V, 4 if dtype == "fp32" else 2, block)
        values = absent | launch
        pointers = {"logits": f"*{dtype}:16", "out": f"*{dtype}:16", "V": "i32:16"}
        configs.append(
            AotConfig(
                kernel,
                {name: kind for name, kind in (types | pointers).items() if name in kernel.arg_names},
                {name: value for name, value in values.items() if name in kernel.arg_names},
                launch["num_warps"],
                launch["num_stages"],
                f"{dtype} V={V}",
            )
        )
    return configs
