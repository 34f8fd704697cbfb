"""The GRPO_rank loss on token log-probabilities.

    rho_t  = exp(logp_t - old_logp_t)
    J_t    = surrogate(rho_t, A) * sampling_ratio_t - beta * KL_t + entropy_coef * H_t
    loss   = -aggregate(J)

    clip   min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A), at least dual_clip A where A < 0
    cispo  stop_gradient(min(rho, bound)) A logp
    sapo   4 / tau sigmoid(tau (rho - 1)) A, tau by the sign of A

Letters: N groups, G responses a group, B = N * G rows (the rows of a group adjacent), T tokens.
Masked tokens and the rows of invalid groups take no part, whatever they hold. Source: arXiv 2510.02561;
the surrogates, KL estimators and aggregations are those of GRPO, DAPO, Dr. GRPO, GSPO, LUSPO, CISPO and
SAPO.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import RankAdvantages, RankInputs, TokenInputs, members_of
from rlaif_fast.loss.options import LOG_RATIO_LIMIT, MIN_RANKED, LossOptions
from rlaif_fast.loss.reference.rank_penalty import rank_penalty


class TokenLoss(NamedTuple):
    """What the reference makes of a batch of token log-probabilities; differentiable where a backend gives gradients.

    Attributes:
        loss: Scalar.
        advantages: (B,), or (B, T) where they were given so.
        stats: (len(STATS),) detached; entries whose input is missing are 0.
    """

    loss: Tensor
    advantages: Tensor
    stats: Tensor


def policy_scores(
    logps: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    group_size: int,
    score: str,
) -> Tensor:  # (N, G)
    """Return the log-probability of each response, per token ("mean") or in all ("sum"), without gradient.

    A response without a token stands last: its sum of 0 would be above every other.
    """
    total, length = logps.detach().where(mask, 0.0).sum(-1), mask.sum(-1)
    if score == "mean":
        total = total / length.clamp(min=1)
    return total.masked_fill(length == 0, torch.finfo(total.dtype).min).view(-1, group_size)


def rank_loss(
    logps: Tensor,  # (B, T) differentiable
    entropy: Tensor | None,  # (B, T) differentiable
    inputs: TokenInputs,
    options: LossOptions,
) -> TokenLoss:
    """Return the loss (see the module's docstring), the advantages it used and its statistics, in float32 or wider."""
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
    B, T = logps.shape
    zero = logps.new_zeros(())
    row_valid = inputs.valid_rows
    if row_valid is None:
        row_valid = logps.new_ones(B, dtype=torch.bool)
    mask = row_valid[:, None].expand(B, T) if inputs.mask is None else inputs.mask & row_valid[:, None]

    # A masked entry may hold anything, NaN too: it is replaced before it meets arithmetic or autograd.
    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(logps.dtype).expand(B, T).where(mask, 0.0)

    logps = logps.where(mask, 0.0)
    old, ref, entropy = clean(inputs.old_logps), clean(inputs.ref_logps), clean(entropy)
    old = logps.detach() if old is None else old.detach()

    ranking = None
    advantages = inputs.advantages
    if inputs.oracle_ranks is not None:
        ranking = _rank(old, mask, inputs, options)
        advantages = ranking.advantages.reshape(B)
    assert advantages is not None
    A = clean(advantages.detach()[:, None] if advantages.dim() == 1 else advantages.detach())
    assert A is not None

    length = mask.sum(-1)
    log_ratio = logps - old
    if options.per_sequence:
        log_ratio = (log_ratio.sum(-1, keepdim=True) / length.clamp(min=1)[:, None]).expand(B, T)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    policy = surrogate(ratio, logps, A, options)
    weight_of_token = clean(inputs.sampling_ratio)
    if weight_of_token is not None:
        policy = policy * weight_of_token.detach()
    kl = None if ref is None else _kl(ref.detach() - logps, ratio, options)

    weight = token_weights(mask, length, row_valid, inputs.num_items, options, logps.dtype)
    entropy_weight = entropy_weights(mask, weight, inputs.num_tokens, options)
    policy_loss = -(policy * weight).sum()
    kl_loss, entropy_loss = zero, zero  # a term without weight may be infinite
    if kl is not None and options.beta != 0.0:
        kl_loss = options.beta * (kl * weight).sum()
    if entropy is not None and options.entropy_coef != 0.0:
        entropy_loss = -options.entropy_coef * (entropy * entropy_weight).sum()
    loss = policy_loss + kl_loss + entropy_loss

    def token_mean(x: Tensor) -> Tensor:
        return (x.to(logps.dtype) * mask).sum() / mask.sum().clamp(min=1)

    low, high = options.clip_bounds
    stats = [
        policy_loss,
        kl_loss,
        entropy_loss,
        zero if kl is None else token_mean(kl),
        zero if entropy is None else token_mean(entropy),
        token_mean((ratio < low) & (A < 0)),
        token_mean((ratio > high) & (A > 0)),
        token_mean(ratio),
        ratio.where(mask, 0.0).max() if ratio.numel() else zero,
        *ranking_stats(ranking, members_of(inputs.judged, inputs.valid), zero),
        mask.sum(),
        _share_of_rows((ratio < low) & (A < 0), mask, length)[0],
        _share_of_rows((ratio > high) & (A > 0), mask, length)[1],
    ]
    return TokenLoss(loss, advantages.detach(), torch.stack([s.detach().to(logps.dtype) for s in stats]))


def _share_of_rows(x: Tensor, mask: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest share of a response's tokens; 0 where there is none."""
    share = (x & mask).sum(-1).double() / length.clamp(min=1)
    full = length > 0
    if not len(share):
        return share.sum(), share.sum()
    return share.where(full, 1.0).amin() * full.any(), share.where(full, 0.0).amax()


def _rank(old: Tensor, mask: Tensor, inputs: TokenInputs, options: LossOptions) -> RankAdvantages:
    """Rank the responses of each group; an invalid group has no judged one."""
    ranks = inputs.oracle_ranks
    assert ranks is not None
    scores = inputs.scores
    if scores is None:
        scores = policy_scores(old, mask, ranks.shape[1], options.score)
    judged = members_of(inputs.judged, inputs.valid)
    if judged is not None:
        judged = judged.expand(ranks.shape)
    return rank_penalty(RankInputs(scores.to(old.dtype), ranks, judged, inputs.weights), options)


def ranking_stats(
    ranking: RankAdvantages | None,
    members: Tensor | None,  # (N, G) or (N, 1) bool; None is all
    zero: Tensor,
) -> list[Tensor]:
    """Return penalty, nDCG, tau and top-1 agreement over what was ranked, and the share without signal."""
    if ranking is None or not len(ranking.ndcg):
        return [zero] * 5
    judged = ranking.advantages.new_ones(ranking.advantages.shape, dtype=torch.bool)
    if members is not None:
        judged = judged & members
    judged = judged & (judged.sum(-1, keepdim=True) >= MIN_RANKED)
    groups = judged.any(-1).sum().clamp(min=1)
    means = [x.sum() / groups for x in (ranking.ndcg, ranking.kendall_tau, ranking.top1_agreement)]
    penalty = ranking.penalties.sum() / judged.sum().clamp(min=1)
    return [penalty, *means, (~ranking.has_signal).to(zero.dtype).mean()]


def surrogate(ratio: Tensor, logps: Tensor, A: Tensor, options: LossOptions) -> Tensor:
    """Return what the policy term of each token is worth: clip, cispo or sapo."""
    low, high = options.clip_bounds
    if options.surrogate == "cispo":  # the bounded ratio only weighs the gradient of logp
        return ratio.clamp(max=high).detach() * A * logps
    if options.surrogate == "sapo":
        tau = torch.full_like(A, options.sapo_temperature_neg)
        tau = tau.masked_fill(A > 0, options.sapo_temperature_pos)
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    policy = torch.minimum(bounded * A, ratio.clamp(low, high) * A)
    if options.dual_clip is not None:
        least = options.dual_clip * A
        policy = torch.where((A < 0) & (policy < least), least, policy)
    return policy


def _kl(
    x: Tensor,  # (B, T) ref_logp - logp
    ratio: Tensor,  # (B, T)
    options: LossOptions,
) -> Tensor:  # (B, T)
    if options.kl == "k1":
        kl = -x
    elif options.kl == "k2":
        if options.kl_clamp is not None:
            # before the square: the gradient of an infinite one is NaN, clamped or not
            bound = math.sqrt(2 * options.kl_clamp)
            x = x.clamp(-bound, bound)
        kl = x.square() / 2
    else:
        x = x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = x.exp() - x - 1
    if options.kl_clamp is not None:
        kl = kl.clamp(-options.kl_clamp, options.kl_clamp)
    return kl * ratio if options.unbiased_kl else kl


def token_weights(
    mask: Tensor,  # (B, T) bool
    length: Tensor,  # (B,)
    row_valid: Tensor,  # (B,) bool
    num_items: Tensor | None,  # scalar
    options: LossOptions,
    dtype: torch.dtype,
) -> Tensor:  # (B, T)
    """Return what each token counts in the aggregate; `LossOptions.aggregate` says what divides it."""
    if num_items is None:
        num_items = items_of(mask, row_valid, options).clamp(min=1)
    items = num_items.to(dtype)
    if options.aggregate == "length":
        return mask / (items * length.clamp(min=1)[:, None])
    if options.aggregate == "constant":
        assert options.max_completion_length is not None
        return mask / (items * options.max_completion_length)
    return mask / items


def items_of(mask: Tensor, row_valid: Tensor, options: LossOptions) -> Tensor:
    """Return how many tokens or responses the aggregate divides by."""
    if options.aggregate == "tokens":
        return mask.sum()
    return (row_valid & mask.any(-1)).sum() if options.empty_rows == "skip" else row_valid.sum()


def entropy_weights(
    mask: Tensor,  # (B, T) bool
    weights: Tensor,  # (B, T)
    num_tokens: Tensor | None,  # scalar
    options: LossOptions,
) -> Tensor:  # (B, T)
    """Return what the entropy of each token counts."""
    if options.entropy_aggregate == "loss":
        return weights
    tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    return mask / tokens.to(weights.dtype)
