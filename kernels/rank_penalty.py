"""Ranks, penalties and advantages of groups: policy scores against an oracle's order, one program a group.

    g(k)      = 1 / ((1 + k) log2(2 + k)), the worth of position k; ties share the mean of their positions
    u, v      = worth of a response in the oracle's and in the policy's order
    penalty   = 1 - min(u, v) / max(u, v)     ("paper": 1 - v / u;  "paper_swapped": 1 - u / v)
    b = u - mean(u),  a = b (1 + w penalty),  A = a - mean(a)      the directed advantage

`rank_group` does one group in registers, as matrices of comparisons (no sort), and is what the fused loss
calls when it closes a group; `rank_penalty` launches it alone. Nothing here has a gradient. Float32 inside.
Quotients are correctly rounded (`div_rn`): a compiled `/` may be off by a bit, and x / x or a mean of equals must not.
Source: arXiv 2510.02561.

Letters: N groups, G responses a group, GP = G rounded up to a power of two. Suffixes: _i this response, _j
the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rlaif_fast.loss.inputs import RankAdvantages, RankInputs
from rlaif_fast.loss.options import MIN_RANKED as LEAST
from rlaif_fast.loss.options import RankOptions
from rlaif_fast_kernels.launch import AotConfig, refuse, unavailable

__all__ = ["aot_configs", "rank_group", "rank_penalty", "supports", "unavailable"]


MIN_RANKED = tl.constexpr(LEAST)


def launch_config(G: int) -> dict[str, int]:
    """The comparisons of one group are GP x GP: at most 16 of them a thread."""
    GP = triton.next_power_of_2(G)
    return {"GP": GP, "num_warps": max(1, min(8, GP * GP // 512)), "num_stages": 1}


@triton.jit
def _positions(key_i, key_j, live_j):
    """Return first, count (GP,): key i shares positions first..first+count-1; the lowest key comes first.

    A NaN is neither lower nor higher than any key: it ties with all.
    """
    first = tl.sum(tl.where(live_j & (key_j < key_i), 1.0, 0.0), axis=1)
    count = tl.sum(tl.where(live_j & ((key_j >= key_i) == (key_j <= key_i)), 1.0, 0.0), axis=1)
    return first, count


@triton.jit
def _tie_mean(worth_k, k, first, count):
    """Mean worth (GP,) of the positions that each response shares."""
    shared = (k >= first[:, None]) & (k < (first + count)[:, None])
    return tl.sum(tl.where(shared, worth_k, 0.0), axis=1) / count


@triton.jit
def _group_mean(x, live, G):
    return tl.div_rn(tl.sum(tl.where(live, x, 0.0)), G.to(tl.float32))


@triton.jit
def _centred(x, live, G):
    """x minus its mean, then minus the mean that rounding left; what equals the mean stays exactly 0."""
    centred = x - _group_mean(x, live, G)
    return centred - tl.where(centred != 0.0, _group_mean(centred, live, G), 0.0)


@triton.jit
def _advantages(
    u, penalty, oracle, live, tied, G, penalty_weight, KIND: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """The advantages (GP,) of a kind, scaled where asked, as `rlaif_fast.loss.advantages` makes them."""
    if KIND == "zscore":
        advantage = _centred(oracle, live, G)
        variance = tl.sum(tl.where(live, advantage * advantage, 0.0)) / tl.maximum(G - 1, 1)
        advantage = advantage / (tl.sqrt(variance) + 1e-4)
    elif KIND == "paper" or KIND == "paper_swapped":
        advantage = -_centred(penalty, live, G)
    else:
        advantage = u - _group_mean(u, live, G)
        if KIND == "directed":
            advantage = advantage * (1.0 + penalty_weight * penalty)
            advantage = advantage - _group_mean(advantage, live, G)
    if KIND != "paper" and KIND != "paper_swapped":  # exact zeros, whatever the mean above rounded to
        advantage = tl.where(tied, 0.0, advantage)
    if SCALE == "group":
        advantage = advantage / (tl.sqrt(_group_mean(advantage * advantage, live, G)) + 1e-6)
    return tl.where(live, advantage, 0.0)


@triton.jit
def _kendall_tau_b(order, score, live):
    """Kendall's tau-b of the oracle's order and the policy's; 0 where one of them is all ties."""
    pair = live[:, None] & live[None, :]
    order_ij = order[:, None] - order[None, :]
    score_ji = score[None, :] - score[:, None]
    sign_u = tl.where(pair, (order_ij > 0).to(tl.float32) - (order_ij < 0).to(tl.float32), 0.0)
    sign_v = tl.where(pair, (score_ji > 0).to(tl.float32) - (score_ji < 0).to(tl.float32), 0.0)
    agreement = tl.sum(tl.sum(sign_u * sign_v, axis=1))
    untied = tl.sum(tl.sum(sign_u * sign_u, axis=1)) * tl.sum(tl.sum(sign_v * sign_v, axis=1))
    return tl.where(untied > 0, tl.div_rn(agreement, tl.sqrt_rn(tl.maximum(untied, 1.0))), 0.0)


@triton.jit
def rank_group(
    score,  # (GP,) policy scores, higher is more likely
    oracle,  # (GP,) ranks, lower is better; rewards, higher is better, for "zscore"
    live,  # (GP,) true for the judged responses of the group
    penalty_weight,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    GP: tl.constexpr,
):
    """Return advantage, penalty (GP,) and ndcg, kendall_tau, top1_agreement, has_signal of one group: all 0 where
    fewer than two responses were judged."""
    members = tl.sum(live.to(tl.int32))
    G = tl.maximum(members, 1)
    live = live & (members >= MIN_RANKED)
    k = tl.arange(0, GP).to(tl.float32)[None, :]
    relevance = 1.0 / (1.0 + k)
    discount = 1.0 / tl.log2(2.0 + k)
    live_j = live[None, :]
    order = -oracle if KIND == "zscore" else oracle
    first_u, count_u = _positions(order[:, None], order[None, :], live_j)
    first_v, count_v = _positions(-score[:, None], -score[None, :], live_j)
    count_u = tl.where(live, count_u, 1.0)  # other lanes compare nothing; keep their quotients finite
    count_v = tl.where(live, count_v, 1.0)
    u = _tie_mean(relevance * discount, k, first_u, count_u)
    v = _tie_mean(relevance * discount, k, first_v, count_v)

    # The quotient is exactly 1 where u = v: scaling a group without penalties would magnify any rest.
    if KIND == "paper":
        penalty = 1.0 - tl.div_rn(v, u)
    elif KIND == "paper_swapped":
        penalty = 1.0 - tl.div_rn(u, v)
    else:
        penalty = 1.0 - tl.div_rn(tl.minimum(u, v), tl.maximum(u, v))
    penalty = tl.where(live, penalty, 0.0)

    ranked = members >= MIN_RANKED
    tied = tl.sum(tl.where(live & (count_u == G), 1, 0)) == G
    advantage = _advantages(u, penalty, oracle, live, tied, G, penalty_weight, KIND, SCALE)

    worth = tl.where(live, _tie_mean(relevance, k, first_u, count_u), 0.0)
    found = tl.sum(worth * _tie_mean(discount, k, first_v, count_v))
    ideal = tl.sum(worth * _tie_mean(discount, k, first_u, count_u))

    tau = _kendall_tau_b(order, score, live)

    best = live & (first_u == 0)
    top1 = tl.div_rn(
        tl.sum(tl.where(best & (first_v == 0), 1.0, 0.0)), tl.maximum(tl.sum(tl.where(best, 1.0, 0.0)), 1.0)
    )
    ndcg = tl.div_rn(found, tl.where(ranked, ideal, 1.0))
    return advantage, penalty, ndcg, tau, top1, tl.where(tied | ~ranked, 0.0, 1.0)


@triton.jit
def rank_penalty_kernel(
    scores,  # (N, G)
    oracle_ranks,  # (N, G)
    judged,  # (N, G) uint8 or None
    weights,  # (N,) or None
    advantages,  # (N, G) out
    penalties,  # (N, G) out
    measures,  # (4, N) out: ndcg, kendall_tau, top1_agreement, has_signal
    N,
    G,
    penalty_weight,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    GP: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    offs_i = tl.arange(0, GP)
    live = offs_i < G
    at = group * G + offs_i
    member = live
    if judged is not None:
        member = live & (tl.load(judged + at, mask=live, other=0) != 0)
    score = tl.load(scores + at, mask=member, other=0.0).to(tl.float32)
    oracle = tl.load(oracle_ranks + at, mask=member, other=0.0).to(tl.float32)
    advantage, penalty, ndcg, tau, top1, signal = rank_group(
        score, oracle, member, penalty_weight, KIND, SCALE, GP
    )
    if weights is not None:
        advantage *= tl.load(weights + group).to(tl.float32)
    tl.store(advantages + at, advantage, mask=live)
    tl.store(penalties + at, penalty, mask=live)
    tl.store(measures + group, ndcg)
    tl.store(measures + N + group, tau)
    tl.store(measures + 2 * N + group, top1)
    tl.store(measures + 3 * N + group, signal)


def rank_penalty(inputs: RankInputs, options: RankOptions) -> RankAdvantages:
    """Return what `reference.rank_penalty` does, in one launch."""
    N, G = inputs.scores.shape
    scores, oracle_ranks = inputs.scores.detach().contiguous(), inputs.oracle_ranks.contiguous()
    judged, weights = inputs.judged, inputs.weights
    advantages, penalties = torch.empty_like(scores), torch.empty_like(scores)
    measures = scores.new_empty((4, N), dtype=torch.float32)
    if N:
        with torch.cuda.device_of(scores):
            rank_penalty_kernel[(N,)](
                scores,
                oracle_ranks,
                None if judged is None else judged.contiguous().view(torch.uint8),
                None if weights is None else weights.contiguous(),
                advantages,
                penalties,
                measures,
                N,
                G,
                options.penalty_weight,
                KIND=options.kind,
                SCALE=options.scale,
                **launch_config(G),
            )
    # Copies: what an operator returns must not share memory.
    ndcg, tau, top1 = (row.to(scores.dtype, copy=True) for row in measures[:3])
    return RankAdvantages(advantages, penalties, ndcg, tau, measures[3].bool(), top1)


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why the kernel cannot take such scores, or None."""
    return refuse("scores", device_type, dtype, group_size)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles."""
    types = dict.fromkeys(("scores", "oracle_ranks", "advantages", "penalties", "measures"), "*fp32:16")
    types |= {"judged": "*u8:16", "weights": "*fp32:16", "N": "i32", "G": "i32", "penalty_weight": "fp32"}
    configs = []
    for G in (8, 64):
        config = launch_config(G)
        constexprs = {"KIND": "directed", "SCALE": "group", "GP": config["GP"]}
        configs.append(
            AotConfig(
                rank_penalty_kernel, types, constexprs, config["num_warps"], config["num_stages"], f"G={G}"
            )
        )
    return configs
