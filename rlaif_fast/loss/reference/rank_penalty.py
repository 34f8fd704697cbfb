"""Ranks, gains, penalties and advantages of groups of responses.

Letters: N groups, G responses a group. Position k (0-based) is worth the gain

    g(k) = 1 / ((1 + k) * log2(2 + k)) = 1 / (1 + k)  *  1 / log2(2 + k)
                                         relevance       discount

and responses that tie over positions k..k+m-1 get the mean over them each, which is the expectation under
random tie-breaking. Source: arXiv 2510.02561 (GRPO_rank).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.advantages import advantages_of
from rlaif_fast.loss.inputs import RankAdvantages, RankInputs
from rlaif_fast.loss.options import RankOptions


def positions(
    keys: Tensor,  # (N, G), lower is better
) -> tuple[Tensor, Tensor]:
    """Return first, count (N, G): key i ties with count - 1 others over positions first..first+count-1."""
    mine, others = keys[:, :, None], keys[:, None, :]
    return (others < mine).sum(-1), (others == mine).sum(-1)


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
    scores, oracle_ranks, valid = inputs.scores, inputs.oracle_ranks, inputs.valid
    G, dtype = scores.shape[1], scores.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scores, oracle = scores.to(wide), oracle_ranks.to(wide)
    k = torch.arange(G, device=scores.device, dtype=wide)
    relevance, discount = 1 / (1 + k), 1 / torch.log2(2 + k)
    gain = relevance * discount

    oracle_at = positions(-oracle if options.kind == "zscore" else oracle)
    policy_at = positions(-scores)
    u, v = tie_mean(gain, *oracle_at), tie_mean(gain, *policy_at)

    if options.kind == "paper":
        penalty = 1 - v / u
    elif options.kind == "paper_swapped":
        penalty = 1 - u / v
    else:
        penalty = 1 - torch.minimum(u, v) / torch.maximum(u, v)

    tied = (oracle_at[1] == G).all(-1)
    advantage = advantages_of(u, penalty, oracle, tied, options)
    ndcg = _ndcg(relevance, discount, oracle_at, policy_at)
    tau = _kendall_tau_b(oracle if options.kind != "zscore" else -oracle, -scores)
    best, first = oracle_at[0] == 0, policy_at[0] == 0
    top1 = (best & first).sum(-1).to(wide) / best.sum(-1)

    keep = torch.ones_like(tied) if valid is None else valid
    row = keep[:, None]
    return RankAdvantages(
        advantages=advantage.where(row, 0.0).to(dtype),
        penalties=penalty.where(row, 0.0).to(dtype),
        ndcg=ndcg.where(keep, 0.0).to(dtype),
        kendall_tau=tau.where(keep, 0.0).to(dtype),
        has_signal=keep & ~tied,
        top1_agreement=top1.where(keep, 0.0).to(dtype),
    )


def _ndcg(
    relevance: Tensor,  # (G,)
    discount: Tensor,  # (G,)
    oracle_at: tuple[Tensor, Tensor],
    policy_at: tuple[Tensor, Tensor],
) -> Tensor:  # (N,)
    """Expected DCG of the policy's order over that of the oracle's own, ties of both broken at random."""
    worth = tie_mean(relevance, *oracle_at)
    found = (worth * tie_mean(discount, *policy_at)).sum(-1)
    ideal = (worth * tie_mean(discount, *oracle_at)).sum(-1)
    return found / ideal


def _kendall_tau_b(
    a: Tensor,  # (N, G)
    b: Tensor,  # (N, G)
) -> Tensor:  # (N,)
    """(concordant - discordant) / sqrt(pairs untied in a * pairs untied in b); 0 where there is none."""
    a_sign = torch.sign(a[:, :, None] - a[:, None, :])
    b_sign = torch.sign(b[:, :, None] - b[:, None, :])
    agreement = (a_sign * b_sign).sum((-1, -2))
    untied = a_sign.square().sum((-1, -2)) * b_sign.square().sum((-1, -2))
    return torch.where(untied > 0, agreement / untied.clamp(min=1).sqrt(), torch.zeros_like(agreement))
