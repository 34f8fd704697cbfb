"""Ranks, gains, penalties and advantages of groups of responses.

Letters: N groups, G responses a group. Position k (0-based) is worth the gain

    g(k) = 1 / ((1 + k) * log2(2 + k)) = 1 / (1 + k)  *  1 / log2(2 + k)
                                         relevance       discount

and responses that tie over positions k..k+m-1 get the mean over them each, which is the expectation under
random tie-breaking. Only the judged responses are members of their group. Source: arXiv 2510.02561 (GRPO_rank).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.advantages import advantages_of
from rlaif_fast.loss.inputs import RankAdvantages, RankInputs
from rlaif_fast.loss.options import MIN_RANKED, RankOptions


def positions(
    keys: Tensor,  # (N, G), lower is better
    members: Tensor,  # (N, G) bool
) -> tuple[Tensor, Tensor]:
    """Return first, count (N, G): key i ties with count - 1 others over positions first..first+count-1.

    A NaN is neither lower nor higher than any key: it ties with all.
    """
    mine, others, live = keys[:, :, None], keys[:, None, :], members[:, None, :]
    first = ((others < mine) & live).sum(-1)
    ties = (others >= mine) == (others <= mine)
    return first, (ties & live).sum(-1).clamp(min=1)  # keeps the quotients of non-members finite


def tie_mean(
    value: Tensor,  # (G,) worth of each position
    first: Tensor,  # (N, G)
    count: Tensor,  # (N, G)
) -> Tensor:  # (N, G)
    """Return the mean worth of the positions that each response shares."""
    k = torch.arange(value.numel(), device=value.device)
    shared = (k >= first[..., None]) & (k < (first + count)[..., None])  # (N, G, G)
    return (shared * value).sum(-1) / count


@torch.no_grad()
def rank_penalty(inputs: RankInputs, options: RankOptions) -> RankAdvantages:
    """Compare the policy's order of each group with the oracle's (see the module's docstring)."""
    dtype = inputs.scores.dtype
    wide = torch.promote_types(dtype, torch.float32)
    members = inputs.scores.new_ones(inputs.scores.shape, dtype=torch.bool)
    if inputs.judged is not None:
        members = inputs.judged
    members = members & (members.sum(-1, keepdim=True) >= MIN_RANKED)
    ranked = members.any(-1)
    scores = inputs.scores.to(wide).where(members, 0.0)
    oracle = inputs.oracle_ranks.to(wide).where(members, 0.0)
    k = torch.arange(scores.shape[1], device=scores.device, dtype=wide)
    relevance, discount = 1 / (1 + k), 1 / torch.log2(2 + k)
    gain = relevance * discount

    order = -oracle if options.kind == "zscore" else oracle
    oracle_at = positions(order, members)
    policy_at = positions(-scores, members)
    u, v = tie_mean(gain, *oracle_at), tie_mean(gain, *policy_at)

    if options.kind == "paper":
        penalty = 1 - v / u
    elif options.kind == "paper_swapped":
        penalty = 1 - u / v
    else:
        penalty = 1 - torch.minimum(u, v) / torch.maximum(u, v)
    penalty = penalty.where(members, 0.0)

    tied = ((oracle_at[1] == members.sum(-1, keepdim=True)) | ~members).all(-1)
    advantage = advantages_of(u, penalty, oracle, members, tied, options)
    if inputs.weights is not None:
        advantage = advantage * inputs.weights.to(wide)[:, None]
    best, first = (oracle_at[0] == 0) & members, policy_at[0] == 0
    top1 = (best & first).sum(-1).to(wide) / best.sum(-1).clamp(min=1)
    return RankAdvantages(
        advantages=advantage.where(members, 0.0).to(dtype),
        penalties=penalty.to(dtype),
        ndcg=_ndcg(relevance, discount, oracle_at, policy_at, members).where(ranked, 0.0).to(dtype),
        kendall_tau=_kendall_tau_b(order, -scores, members).to(dtype),
        has_signal=ranked & ~tied,
        top1_agreement=top1.to(dtype),
    )


def _ndcg(
    relevance: Tensor,  # (G,)
    discount: Tensor,  # (G,)
    oracle_at: tuple[Tensor, Tensor],
    policy_at: tuple[Tensor, Tensor],
    members: Tensor,  # (N, G) bool
) -> Tensor:  # (N,)
    """Expected DCG of the policy's order over that of the oracle's own, ties of both broken at random."""
    worth = tie_mean(relevance, *oracle_at).where(members, 0.0)
    found = (worth * tie_mean(discount, *policy_at)).sum(-1)
    ideal = (worth * tie_mean(discount, *oracle_at)).sum(-1)
    return found / ideal


def _kendall_tau_b(
    a: Tensor,  # (N, G)
    b: Tensor,  # (N, G)
    members: Tensor,  # (N, G) bool
) -> Tensor:  # (N,)
    """(concordant - discordant) / sqrt(pairs untied in a * pairs untied in b); 0 where there is none."""
    pair = members[:, :, None] & members[:, None, :]
    a_sign, b_sign = (
        torch.sign(x[:, :, None] - x[:, None, :]).nan_to_num() * pair  # a NaN ties with all
        for x in (a, b)
    )
    agreement = (a_sign * b_sign).sum((-1, -2))
    untied = a_sign.square().sum((-1, -2)) * b_sign.square().sum((-1, -2))
    return torch.where(untied > 0, agreement / untied.clamp(min=1).sqrt(), torch.zeros_like(agreement))
