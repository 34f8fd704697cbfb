"""The end of the rank loss: device functions that close a group of responses, and the batch.

`rank_loss_kernel` leaves ROW_SUMS sums of each response; the last program of a group calls `close_group`,
which ranks the responses, weighs their sums with the advantages they get and leaves GROUP_SUMS sums; the
last of the batch calls `close_batch`, which turns those into the loss, its statistics and the weight of
each response.

The rows of row_sums are named ROW_..., those of group_sums GROUP_...: the statistics in the order of
`options.STATS`, as sums or extremes, and three more. GROUP_LOW_MIN is 1 less the share.

Letters: N groups, G responses a group, B rows, GP = G rounded up to a power of two. Suffix: _i response of
a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlaif_fast.loss.options import STATS
from rlaif_fast_kernels.rank_penalty import MIN_RANKED, rank_group
from rlaif_fast_kernels.token_terms import importance_ratio, load_float, one_sided, policy_slope

ROW_SUMS = 11
(
    ROW_TOKENS,
    ROW_SCORE,
    ROW_UPPER,  # what multiplies A >= 0
    ROW_LOWER,  # what multiplies A < 0
    ROW_KL,
    ROW_ENTROPY,
    ROW_UNDER,  # tokens under the clip bounds
    ROW_OVER,
    ROW_RATIO,
    ROW_RATIO_MAX,
    ROW_LOG_RATIO,
) = map(tl.constexpr, range(ROW_SUMS))
STATISTICS = tl.constexpr(len(STATS))
GROUP_SUMS = tl.constexpr(len(STATS) + 3)
(
    GROUP_POLICY_LOSS,
    GROUP_KL_LOSS,
    GROUP_ENTROPY_LOSS,
    GROUP_KL,  # before it the three losses
    GROUP_ENTROPY,
    GROUP_UNDER,
    GROUP_OVER,
    GROUP_RATIO,
    GROUP_RATIO_MAX,
    GROUP_PENALTY,
    GROUP_NDCG,
    GROUP_TAU,
    GROUP_TOP1,
    GROUP_NO_SIGNAL,
    GROUP_TOKENS,
    GROUP_LOW_MIN,
    GROUP_HIGH_MAX,
    GROUP_COUNTED,  # responses that count
    GROUP_RANKED,  # groups that were ranked
    GROUP_MEMBERS,  # responses in them
) = map(tl.constexpr, range(len(STATS) + 3))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
GROUP_ROWS = tl.constexpr(32)  # of a block of them


@triton.jit
def _load_shared(x, k, stride, live):
    """Read what another program of this launch wrote, bypassing the first-level cache."""
    return tl.load(x + k * stride, mask=live, other=0.0, cache_modifier=".cg")


@triton.jit
def close_group(
    row_sums, given, oracle_ranks, scores, judged, weights, valid, advantages, row_slopes, group_sums, group,
    responses, B, N, G, penalty_weight, low, high, delta, dual_clip, max_length,
    KIND: tl.constexpr, SCALE: tl.constexpr, SCORE: tl.constexpr, AGGREGATE: tl.constexpr,
    SKIP_EMPTY: tl.constexpr, SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Rank the responses of a group, weigh their sums with the advantages, leave the group's sums."""
    offs_i = tl.arange(0, GP)
    live = offs_i < responses
    at = group * G + offs_i
    kept = live
    if valid is not None:
        kept = tl.where(tl.load(valid + group) != 0, offs_i, GP) < responses
    rows = row_sums + at
    tokens = _load_shared(rows, ROW_TOKENS, B, live)
    score = _load_shared(rows, ROW_SCORE, B, live)
    upper_sum = _load_shared(rows, ROW_UPPER, B, live)
    lower_sum = _load_shared(rows, ROW_LOWER, B, live)
    low_count = _load_shared(rows, ROW_UNDER, B, live)
    high_count = _load_shared(rows, ROW_OVER, B, live)
    rho_sum = _load_shared(rows, ROW_RATIO, B, live)
    rho_max = _load_shared(rows, ROW_RATIO_MAX, B, live)
    length = tl.maximum(tokens, 1.0)

    penalty, ndcg, tau, top1, signal = tl.zeros((GP,), tl.float32), 0.0, 0.0, 0.0, 1.0
    members = 0.0
    if oracle_ranks is not None:
        if scores is not None:
            score = load_float(scores, at, live)
        else:
            if SCORE == "mean":
                score = tl.div_rn(score, length)  # equal means must tie
            score = tl.where(tokens > 0, score, LOWEST)  # a response without a token stands last
        member = kept
        if judged is not None:
            member = member & (tl.load(judged + at, mask=live, other=0) != 0)
        oracle = load_float(oracle_ranks, at, member)
        A, penalty, ndcg, tau, top1, signal = rank_group(
            score, oracle, member, penalty_weight, KIND, SCALE, GP
        )
        members = tl.sum(member.to(tl.float32))
        members = tl.where(members >= MIN_RANKED, members, 0.0)
        if weights is not None:
            A *= tl.load(weights + group).to(tl.float32)
        tl.store(advantages + at, A, mask=live)
    elif PER_TOKEN:
        A = tl.full((GP,), 1.0, tl.float32)  # already in the sums
    else:
        A = load_float(given, at, live)

    if SEQUENCE:
        log_ratio = _load_shared(rows, ROW_LOG_RATIO, B, live) / length
        rho = importance_ratio(log_ratio)
        upper, lower = one_sided(rho, rho, low, high, delta, dual_clip, 1.0, 1.0, "clip")
        slope = upper_sum * policy_slope(log_ratio, rho, A, low, high, delta, dual_clip, 1.0, 1.0, "clip")
        if PER_TOKEN:
            slope -= lower_sum * policy_slope(
                log_ratio, rho, -A, low, high, delta, dual_clip, 1.0, 1.0, "clip"
            )
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
    if AGGREGATE == "length":
        share = 1.0 / length
    elif AGGREGATE == "constant":
        share = share / max_length
    counted = tl.where(kept, 1.0, 0.0)
    if SKIP_EMPTY:
        counted = tl.where(tokens > 0, counted, 0.0)
    kl_sum = _load_shared(rows, ROW_KL, B, live)
    entropy_sum = _load_shared(rows, ROW_ENTROPY, B, live)
    mine = group_sums + group
    tl.store(mine + GROUP_POLICY_LOSS * N, tl.sum(policy * share))
    tl.store(mine + GROUP_KL_LOSS * N, tl.sum(kl_sum * share))
    tl.store(mine + GROUP_ENTROPY_LOSS * N, tl.sum(entropy_sum * share))
    tl.store(mine + GROUP_KL * N, tl.sum(kl_sum))
    tl.store(mine + GROUP_ENTROPY * N, tl.sum(entropy_sum))
    tl.store(mine + GROUP_UNDER * N, tl.sum(low_count))
    tl.store(mine + GROUP_OVER * N, tl.sum(high_count))
    tl.store(mine + GROUP_RATIO * N, tl.sum(rho_sum))
    tl.store(mine + GROUP_RATIO_MAX * N, tl.max(rho_max))
    tl.store(mine + GROUP_PENALTY * N, tl.sum(penalty))
    tl.store(mine + GROUP_NDCG * N, ndcg)
    tl.store(mine + GROUP_TAU * N, tau)
    tl.store(mine + GROUP_TOP1 * N, top1)
    tl.store(mine + GROUP_NO_SIGNAL * N, 1.0 - signal)
    tl.store(mine + GROUP_TOKENS * N, tl.sum(tokens))
    tl.store(mine + GROUP_LOW_MIN * N, tl.max(tl.where(tokens > 0, 1.0 - low_count / length, 0.0)))
    tl.store(mine + GROUP_HIGH_MAX * N, tl.max(high_count / length))
    tl.store(mine + GROUP_COUNTED * N, tl.sum(counted))
    tl.store(mine + GROUP_RANKED * N, tl.where(members > 0, 1.0, 0.0))
    tl.store(mine + GROUP_MEMBERS * N, members)


@triton.jit
def _pick(total, offs_k, k):
    return tl.sum(tl.where(offs_k == k, total, 0.0))


@triton.jit
def close_batch(
    row_sums, group_sums, valid, num_items, num_tokens, row_weights, entropy_weight, loss_out, stats_out, B, N, G,
    beta, entropy_coef, max_length,
    AGGREGATE: tl.constexpr, ENTROPY_TOKENS: tl.constexpr, HAS_RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the groups; write the statistics, the loss, and the weights of each response and of the entropy."""
    offs_k = tl.arange(0, GROUP_ROWS)
    used = offs_k[:, None] < GROUP_SUMS
    extreme = (offs_k == GROUP_RATIO_MAX) | (offs_k == GROUP_LOW_MIN) | (offs_k == GROUP_HIGH_MAX)
    block_sums = tl.zeros((GROUP_ROWS, BLOCK), tl.float32)
    for first in tl.range(0, N, BLOCK):
        offs_n = first + tl.arange(0, BLOCK)[None, :]
        at = offs_k.to(tl.int64)[:, None] * N + offs_n
        part = tl.load(group_sums + at, mask=used & (offs_n < N), other=0.0, cache_modifier=".cg")
        block_sums = tl.where(extreme[:, None], tl.maximum(block_sums, part), block_sums + part)
    total = tl.where(extreme, tl.max(block_sums, axis=1), tl.sum(block_sums, axis=1))
    tokens = _pick(total, offs_k, GROUP_TOKENS)
    if num_items is not None:
        items = tl.load(num_items).to(tl.float32)
    else:
        items = tl.maximum(tokens if AGGREGATE == "tokens" else _pick(total, offs_k, GROUP_COUNTED), 1.0)
    entropy_share = 1.0 / items
    if ENTROPY_TOKENS:
        if num_tokens is not None:
            entropy_share = 1.0 / tl.load(num_tokens).to(tl.float32)
        else:
            entropy_share = 1.0 / tl.maximum(tokens, 1.0)
        total = tl.where(offs_k == GROUP_ENTROPY_LOSS, _pick(total, offs_k, GROUP_ENTROPY), total)
        tl.store(entropy_weight, entropy_share)

    scale = tl.where(offs_k == GROUP_POLICY_LOSS, -1.0, beta) / items
    scale = tl.where(offs_k == GROUP_ENTROPY_LOSS, -entropy_coef * entropy_share, scale)
    scale = tl.where(offs_k < GROUP_KL, scale, 1.0 / tl.maximum(tokens, 1.0))
    scale = tl.where(extreme | (offs_k == GROUP_TOKENS), 1.0, scale)
    scale = tl.where(
        offs_k == GROUP_PENALTY, 1.0 / tl.maximum(_pick(total, offs_k, GROUP_MEMBERS), 1.0), scale
    )
    groups = tl.maximum(_pick(total, offs_k, GROUP_RANKED), 1.0)
    scale = tl.where((offs_k >= GROUP_NDCG) & (offs_k <= GROUP_TOP1), 1.0 / groups, scale)
    scale = tl.where(offs_k == GROUP_NO_SIGNAL, (1.0 / N) if HAS_RANKS else 0.0, scale)
    total = tl.where(offs_k == GROUP_LOW_MIN, tl.where(tokens > 0, 1.0 - total, total), total)
    stats = tl.where(scale == 0, 0.0, total * scale)  # a term without weight may be infinite
    loss = tl.sum(tl.where(offs_k < GROUP_KL, stats, 0.0))
    tl.store(loss_out, loss)
    tl.store(stats_out + offs_k, stats, mask=offs_k < STATISTICS)

    for first in tl.range(0, B, 4 * BLOCK):
        offs_b = first + tl.arange(0, 4 * BLOCK)
        live = offs_b < B
        weight = tl.full((4 * BLOCK,), 1.0, tl.float32) / items
        if AGGREGATE == "length":
            weight /= tl.maximum(_load_shared(row_sums + offs_b, ROW_TOKENS, B, live), 1.0)
        elif AGGREGATE == "constant":
            weight /= max_length
        if valid is not None:
            weight = tl.where(tl.load(valid + offs_b // G, mask=live, other=0) != 0, weight, 0.0)
        tl.store(row_weights + offs_b, weight, mask=live)
