"""One row of logits: its statistics in one sweep over the vocabulary, and its gradient in another.

A logit is capped first where there is a cap: x, or c tanh(inner x). Each lane keeps its own running maximum m of x,
and with d = (x - m) scale, in units of log 2, the sums s = sum 2^d and w = sum 2^d d of VEC neighbouring logits, so
that no thread waits for another within the sweep. The maximum is subtracted before the scale is applied: a fused
multiply-add of x scale - m scale would leave the rounding of m scale in d, which is not small at large logits. The
entropy comes from d, which does not cancel. The next block is loaded before this one is used.

Device functions, for `logits_loss`, which says what they compute. Letters: V vocabulary, y the token.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)  # below every logit; finite, so that differences and products with 0 are
LEAST = tl.constexpr(-1e3)  # exp2 of it is 0, and its product with any gradient finite
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def row_of(x, row, T, stride_b, stride_t):
    return x + (row // T) * stride_b + (row % T) * stride_t


@triton.jit
def _lanes(VEC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Offsets (BLOCK_V / VEC, VEC): the second axis lies within a thread."""
    return tl.arange(0, BLOCK_V // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def _capped(x, inner, cap):
    """c tanh(inner x) in float32, or x where there is no cap."""
    x = x.to(tl.float32)
    if cap is None:
        capped = x
    else:
        capped = cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E * inner))))
    return capped


@triton.jit
def sweep(x, V, y, scale, inner, cap, VEC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return lse in units of log 2, and logp and H in nats, of one row; scale is log2(e) / temperature."""
    offs_v = _lanes(VEC, BLOCK_V)
    m = tl.full((BLOCK_V // VEC,), FLOOR, tl.float32)
    s = tl.zeros((BLOCK_V // VEC,), tl.float32)
    w = tl.zeros((BLOCK_V // VEC,), tl.float32)
    ahead = tl.load(x + offs_v, mask=offs_v < V, other=float("-inf"), eviction_policy="evict_last")
    for v in tl.range(BLOCK_V, V + BLOCK_V, BLOCK_V):
        z = _capped(ahead, inner, cap)
        if cap is not None:
            z = tl.where(v - BLOCK_V + offs_v < V, z, float("-inf"))
        at = v + offs_v
        ahead = tl.load(x + at, mask=at < V, other=float("-inf"), eviction_policy="evict_last")
        m_new = tl.maximum(m, tl.max(z, axis=1))
        shift = tl.maximum((m - m_new) * scale, FLOOR)  # s is 0 before the first logit, and 0 * -inf is NaN
        decay = tl.exp2(shift)
        d = (z - m_new[:, None]) * scale
        e = tl.exp2(d)
        w = decay * (w + s * shift) + tl.sum(e * tl.maximum(d, FLOOR), axis=1)
        s = decay * s + tl.sum(e, axis=1)
        m = m_new
    top = tl.max(m, axis=0)
    shift = tl.maximum((m - top) * scale, FLOOR)
    decay = tl.exp2(shift)
    total = tl.sum(decay * s, axis=0)
    mean = tl.sum(decay * (w + s * shift), axis=0) / total  # of d under softmax
    inside = (y >= 0) & (y < V)
    z_y = _capped(tl.load(x + tl.where(inside, y, 0)), inner, cap)
    log_total = tl.log2(total)
    logp = tl.where(inside, ((z_y - top) * scale - log_total) * LN2, float("nan"))
    return top * scale + log_total, logp, (log_total - mean) * LN2


@triton.jit
def write_grad(
    x, out, V, y, scale, inner, cap, inv_temperature, lse2, H, g, h, VEC: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Write one row of the gradient, from its end, which the sweep read last and the cache still holds."""
    offs_v = _lanes(VEC, BLOCK_V)
    g *= inv_temperature
    h *= inv_temperature
    blocks = (V + BLOCK_V - 1) // BLOCK_V
    if (g == 0) & (h == 0):
        for block in tl.range(0, blocks):
            at = block * BLOCK_V + offs_v
            tl.store(out + at, tl.zeros((BLOCK_V // VEC, VEC), tl.float32), mask=at < V)
    else:
        at = (blocks - 1) * BLOCK_V + offs_v
        ahead = tl.load(x + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first")
        for _ in tl.range(0, blocks):
            capped = _capped(ahead, inner, cap)
            d = capped * scale - lse2
            before = at - BLOCK_V
            ahead = tl.load(x + before, mask=before >= 0, other=float("-inf"), eviction_policy="evict_first")
            p = tl.exp2(d)
            slope = g + h * (tl.maximum(d, LEAST) * LN2 + H)
            grad = tl.where(at == y, g, 0.0) - p * slope
            if cap is not None:
                share = capped / cap
                grad *= inner * cap * (1.0 - share * share)  # d (c tanh u) / du = c (1 - tanh^2)
            tl.store(out + at, grad, mask=at < V)
            at = before
