"""The ends of the rank loss: device functions that close a group of responses, and the batch.

`rank_loss_kernel` leaves ROW_SUMS sums of each response; the last program of a group calls `close_group`,
which ranks the responses, weighs their sums with the advantages they get and leaves GROUP_SUMS sums; the
last of the batch calls `close_batch`, which turns those into the loss, its statistics and the weight of
each response.

The rows of row_sums: 0 tokens, 1 score, 2 and 3 what multiplies A >= 0 and A < 0, 4 KL, 5 entropy, 6 and 7
tokens under and over the clip bounds, 8 and 9 sum and maximum of the ratio, 10 log-ratio. Those of
group_sums are the statistics in the order of `options.STATS`, as sums, and last the number of responses
that count.

Letters: N groups, G responses a group, B rows, GP = G rounded up to a power of two. Suffix: _i response of
a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlaif_fast_kernels.rank_penalty import rank_group
from rlaif_fast_kernels.token_terms import importance_ratio, load_float, one_sided, policy_slope

ROW_SUMS = 11
GROUP_SUMS = tl.constexpr(16)


@triton.jit
def _load_shared(x, k, stride, live):
    """Read what another program of this launch wrote: past the first-level cache."""
    return tl.load(x + k * stride, mask=live, other=0.0, cache_modifier=".cg")


@triton.jit
def close_group(
    row_sums, given, oracle_ranks, valid, advantages, row_slopes, group_sums, group, responses, B, N, G,
    penalty_weight, low, high, delta, max_length,
    KIND: tl.constexpr, SCALE: tl.constexpr, SCORE: tl.constexpr, LOSS_TYPE: tl.constexpr,
    SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Rank the responses of a group, weigh their sums with the advantages, leave the group's sums."""
    offs_i = tl.arange(0, GP)
    live = offs_i < responses
    at = group * G + offs_i
    keep = 1.0 if valid is None else (tl.load(valid + group) != 0).to(tl.float32)
    rows = row_sums + at
    tokens = _load_shared(rows, 0, B, live)
    score = _load_shared(rows, 1, B, live)
    upper_sum = _load_shared(rows, 2, B, live)
    lower_sum = _load_shared(rows, 3, B, live)
    low_count = _load_shared(rows, 6, B, live)
    high_count = _load_shared(rows, 7, B, live)
    rho_sum = _load_shared(rows, 8, B, live)
    rho_max = _load_shared(rows, 9, B, live)
    length = tl.maximum(tokens, 1.0)

    penalty, ndcg, tau, top1, signal = tl.zeros((GP,), tl.float32), 0.0, 0.0, 0.0, 1.0
    if oracle_ranks is not None:
        if SCORE == "mean":
            score = score / length
        oracle = load_float(oracle_ranks, at, live)
        A, penalty, ndcg, tau, top1, signal = rank_group(
            score, oracle, live, G, penalty_weight, KIND, SCALE, GP
        )
        A = tl.where(keep != 0, A, 0.0)
        tl.store(advantages + at, A, mask=live)
    elif PER_TOKEN:
        A = tl.full((GP,), 1.0, tl.float32)  # already in the sums
    else:
        A = load_float(given, at, live)

    if SEQUENCE:
        log_ratio = _load_shared(rows, 10, B, live) / length
        rho = importance_ratio(log_ratio)
        upper, lower = one_sided(rho, low, high, delta)
        if PER_TOKEN:
            slope = upper_sum * policy_slope(log_ratio, rho, A, low, high, delta)
            slope -= lower_sum * policy_slope(log_ratio, rho, -A, low, high, delta)
        else:
            slope = upper_sum * policy_slope(log_ratio, rho, A, low, high, delta)
        tl.store(row_slopes + at, slope / length, mask=live)
        upper_sum *= upper
        lower_sum *= lower
        low_count = tl.where(rho < low, low_count, 0.0)
        high_count = tl.where(rho > high, high_count, 0.0)
        rho_sum = rho * tokens
        rho_max = tl.where(tokens > 0, rho, 0.0)

    if PER_TOKEN:
        policy = upper_sum + lower_sum
    else:
        policy = A * tl.where(A >= 0, upper_sum, lower_sum)
        low_count = tl.where(A < 0, low_count, 0.0)
        high_count = tl.where(A > 0, high_count, 0.0)

    share = tl.full((GP,), 1.0, tl.float32)
    if LOSS_TYPE == "grpo":
        share = 1.0 / length
    elif LOSS_TYPE == "dr_grpo":
        share = share / max_length
    kl_sum = _load_shared(rows, 4, B, live)
    entropy_sum = _load_shared(rows, 5, B, live)
    mine = group_sums + group
    tl.store(mine, tl.sum(policy * share))
    tl.store(mine + N, tl.sum(kl_sum * share))
    tl.store(mine + 2 * N, tl.sum(entropy_sum * share))
    tl.store(mine + 3 * N, tl.sum(kl_sum))
    tl.store(mine + 4 * N, tl.sum(entropy_sum))
    tl.store(mine + 5 * N, tl.sum(low_count))
    tl.store(mine + 6 * N, tl.sum(high_count))
    tl.store(mine + 7 * N, tl.sum(rho_sum))
    tl.store(mine + 8 * N, tl.max(rho_max))
    tl.store(mine + 9 * N, tl.sum(penalty) * keep)
    tl.store(mine + 10 * N, ndcg * keep)
    tl.store(mine + 11 * N, tau * keep)
    tl.store(mine + 12 * N, top1 * keep)
    tl.store(mine + 13 * N, 1.0 - signal * keep)
    tl.store(mine + 14 * N, tl.sum(tokens))
    tl.store(mine + 15 * N, responses * keep)


@triton.jit
def close_batch(
    row_sums, group_sums, valid, num_items, row_weights, loss_out, stats_out, B, N, G,
    beta, entropy_coef, max_length,
    LOSS_TYPE: tl.constexpr, HAS_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the groups; write the statistics, the loss and the weight of each response."""
    offs_k = tl.arange(0, GROUP_SUMS)
    block_sums = tl.zeros((GROUP_SUMS, BLOCK), tl.float32)
    for first in tl.range(0, N, BLOCK):
        offs_n = first + tl.arange(0, BLOCK)[None, :]
        at = offs_k.to(tl.int64)[:, None] * N + offs_n
        part = tl.load(group_sums + at, mask=offs_n < N, other=0.0, cache_modifier=".cg")
        block_sums = tl.where(offs_k[:, None] == 8, tl.maximum(block_sums, part), block_sums + part)
    total = tl.where(offs_k == 8, tl.max(block_sums, axis=1), tl.sum(block_sums, axis=1))
    tokens = tl.sum(tl.where(offs_k == 14, total, 0.0))
    responses = tl.sum(tl.where(offs_k == 15, total, 0.0))
    if num_items is not None:
        items = tl.load(num_items).to(tl.float32)
    else:
        items = tokens if LOSS_TYPE == "dapo" else responses
    items = tl.maximum(items, 1.0)

    groups = responses / G if HAS_RANKS else 1.0
    part_scale = tl.where(offs_k == 0, -1.0, tl.where(offs_k == 1, beta, -entropy_coef)) / items
    scale = tl.where(offs_k < 3, part_scale, 1.0 / tl.maximum(tokens, 1.0))  # of 3-7
    scale = tl.where((offs_k == 8) | (offs_k == 14), 1.0, scale)
    scale = tl.where(offs_k == 9, 1.0 / tl.maximum(responses, 1.0), scale)
    scale = tl.where((offs_k >= 10) & (offs_k <= 12), 1.0 / tl.maximum(groups, 1.0), scale)
    scale = tl.where(offs_k == 13, (1.0 / N) if HAS_RANKS else 0.0, scale)
    stats = total * scale
    loss = tl.sum(tl.where(offs_k < 3, stats, 0.0))
    tl.store(loss_out, loss)
    tl.store(stats_out + offs_k, stats, mask=offs_k < GROUP_SUMS - 1)

    for first in tl.range(0, B, 4 * BLOCK):
        offs_b = first + tl.arange(0, 4 * BLOCK)
        live = offs_b < B
        weight = tl.full((4 * BLOCK,), 1.0, tl.float32) / items
        if LOSS_TYPE == "grpo":
            weight /= tl.maximum(_load_shared(row_sums + offs_b, 0, B, live), 1.0)
        elif LOSS_TYPE == "dr_grpo":
            weight /= max_length
        if valid is not None:
            weight = tl.where(tl.load(valid + offs_b // G, mask=live, other=0) != 0, weight, 0.0)
        tl.store(row_weights + offs_b, weight, mask=live)
