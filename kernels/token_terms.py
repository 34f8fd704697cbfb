"""How the tokens of a response are read, and the terms of one in the loss with their derivatives: device functions
that the fused kernels share.

    rho      = exp(clamp(logp - old_logp))          clamp to +-LOG_RATIO_LIMIT, no gradient beyond
    J        = min(min(rho, delta) A, clip(rho, low, high) A)
             = A * upper(rho) where A >= 0, A * lower(rho) where A < 0
    upper    = min(min(rho, delta), clip(rho)),   lower = max(min(rho, delta), clip(rho))
    KL       k3: exp(x) - x - 1,  k1: -x,  k2: x^2 / 2,             x = ref_logp - logp, clamped in k3

The one-sided forms do not need A, so they can be summed over a response before its rank is known.
Works on blocks of any shape, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlaif_fast.loss.options import LOG_RATIO_LIMIT

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
ALL = tl.constexpr(tl.PropagateNan.ALL)  # a NaN log-probability must reach the loss, not vanish in a min()


@triton.jit
def load_float(x, at, live):
    return tl.load(x + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def response_span(row, T, cu_seqlens):
    """First element and length of a response."""
    if cu_seqlens is None:
        start, length = row * T, T
    else:
        start = tl.load(cu_seqlens + row).to(tl.int64)
        length = (tl.load(cu_seqlens + row + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def importance_ratio(log_ratio):
    return tl.exp(_clip(log_ratio, -LIMIT, LIMIT))


@triton.jit
def one_sided(rho, low, high, delta):
    """Return upper, lower: what multiplies an advantage >= 0 and one < 0."""
    clipped = _clip(rho, low, high)
    bounded = rho if delta is None else tl.minimum(rho, delta, propagate_nan=ALL)
    return tl.minimum(bounded, clipped, propagate_nan=ALL), tl.maximum(bounded, clipped, propagate_nan=ALL)


@triton.jit
def policy_slope(log_ratio, rho, A, low, high, delta):
    """Return dJ / dlogp: rho * A where the branch that min() takes still moves with rho, else 0."""
    clipped = _clip(rho, low, high)
    bounded = rho if delta is None else tl.minimum(rho, delta, propagate_nan=ALL)
    at_bound = tl.where(bounded * A <= clipped * A, bounded < rho, (clipped < rho) | (clipped > rho))
    return tl.where(at_bound | (tl.abs(log_ratio) > LIMIT), 0.0, rho * A)  # comparisons let a NaN through


@triton.jit
def kl_term(x, KL: tl.constexpr):
    """Return KL and dKL / dlogp of x = ref_logp - logp."""
    if KL == "k1":
        kl, slope = -x, 1.0
    elif KL == "k2":
        kl, slope = x * x * 0.5, -x
    else:
        beyond = tl.abs(x) > LIMIT
        x = _clip(x, -LIMIT, LIMIT)
        # exp(x) - 1 and exp(x) - 1 - x cancel near 0: a series there
        tail = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
        kl = tl.where(tl.abs(x) < 0.5, tail, tl.exp(x) - 1.0 - x)
        slope = tl.where(beyond, 0.0, -(kl + x))
    return kl, slope
