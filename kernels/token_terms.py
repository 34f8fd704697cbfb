"""The terms of one token in the loss, with their derivatives: device functions that the fused kernels share.

    rho      = exp(clamp(logp - old_logp))          clamp to +-LOG_RATIO_LIMIT, no gradient beyond
    J        = A * upper where A >= 0, A * lower where A < 0
    clip     J = min(min(rho, delta) A, clip(rho, low, high) A), at least dual_clip A where A < 0:
             upper = min(min(rho, delta), clip(rho)),   lower = min(max(min(rho, delta), clip(rho)), dual_clip)
    cispo    upper = lower = stop_gradient(min(rho, high)) logp
    sapo     4 / tau sigmoid(tau (rho - 1)),   tau_pos above, tau_neg below
    KL       k3: exp(x) - x - 1,  k1: -x,  k2: x^2 / 2,             x = ref_logp - logp, clamped in k3;
             kept within +-kl_clamp, times rho where it is UNBIASED

The one-sided forms do not need A, so they can be summed over a response before its rank is known.
Works on blocks of any shape, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlaif_fast.loss.options import LOG_RATIO_LIMIT, LossOptions

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
NO_BOUND = 1e30  # above every ratio
ALL = tl.constexpr(tl.PropagateNan.ALL)  # a NaN log-probability must reach the loss, not vanish in a min()


def policy_arguments(options: LossOptions) -> tuple[float | None, ...]:
    """Return low, high, delta, dual_clip, tau_pos, tau_neg as the kernels take them."""
    low, high = options.clip_bounds
    taus = options.sapo_temperature_pos, options.sapo_temperature_neg
    return low, min(high, NO_BOUND), options.delta, options.dual_clip, *taus


def kl_and_surrogate(options: LossOptions) -> dict[str, object]:
    """Return the compile-time values of `policy_slope` and `kl_term`."""
    return {"KL": options.kl, "UNBIASED": options.unbiased_kl, "SURROGATE": options.surrogate}


@triton.jit
def load_float(x, at, live):
    return tl.load(x + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def importance_ratio(log_ratio):
    return tl.exp(_clip(log_ratio, -LIMIT, LIMIT))


@triton.jit
def _gate(rho, tau):
    return 1.0 / (1.0 + tl.exp(-tau * (rho - 1.0)))


@triton.jit
def one_sided(rho, logp, low, high, delta, dual_clip, tau_pos, tau_neg, SURROGATE: tl.constexpr):
    """Return upper, lower: what multiplies an advantage >= 0 and one < 0."""
    if SURROGATE == "cispo":
        upper = tl.minimum(rho, high, propagate_nan=ALL) * logp
        lower = upper
    elif SURROGATE == "sapo":
        upper = 4.0 / tau_pos * _gate(rho, tau_pos)
        lower = 4.0 / tau_neg * _gate(rho, tau_neg)
    else:
        clipped = _clip(rho, low, high)
        bounded = rho if delta is None else tl.minimum(rho, delta, propagate_nan=ALL)
        upper = tl.minimum(bounded, clipped, propagate_nan=ALL)
        lower = tl.maximum(bounded, clipped, propagate_nan=ALL)
        if dual_clip is not None:
            lower = tl.minimum(lower, dual_clip, propagate_nan=ALL)
    return upper, lower


@triton.jit
def policy_slope(log_ratio, rho, A, low, high, delta, dual_clip, tau_pos, tau_neg, SURROGATE: tl.constexpr):
    """Return dJ / dlogp: A times what still moves with rho in the branch that is taken."""
    if SURROGATE == "cispo":
        slope = tl.minimum(rho, high, propagate_nan=ALL) * A
    elif SURROGATE == "sapo":
        gate = _gate(rho, tl.where(A > 0, tau_pos, tau_neg))
        slope = tl.where(tl.abs(log_ratio) > LIMIT, 0.0, 4.0 * gate * (1.0 - gate) * rho * A)
    else:
        clipped = _clip(rho, low, high)
        bounded = rho if delta is None else tl.minimum(rho, delta, propagate_nan=ALL)
        at_bound = tl.where(bounded * A <= clipped * A, bounded < rho, (clipped < rho) | (clipped > rho))
        slope = tl.where(at_bound | (tl.abs(log_ratio) > LIMIT), 0.0, rho * A)  # a NaN passes comparisons
        if dual_clip is not None:
            slope = tl.where(tl.maximum(bounded, clipped) > dual_clip, tl.maximum(slope, 0.0), slope)
    return slope


@triton.jit
def kl_term(x, log_ratio, rho, kl_clamp, KL: tl.constexpr, UNBIASED: tl.constexpr):
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
    if kl_clamp is not None:
        slope = tl.where(tl.abs(kl) > kl_clamp, 0.0, slope)
        kl = _clip(kl, -kl_clamp, kl_clamp)
    if UNBIASED:
        moves = tl.where(tl.abs(log_ratio) > LIMIT, 0.0, rho)
        slope = slope * rho + kl * moves
        kl = kl * rho
    return kl, slope
