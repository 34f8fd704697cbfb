"""The GRPO_rank loss on token log-probabilities.

    rho_t  = exp(logp_t - old_logp_t)
    J_t    = min(rho_t * A, clip(rho_t, 1 - epsilon_low, 1 + epsilon_high) * A) * sampling_ratio_t
             - beta * KL_t + entropy_coef * H_t
    loss   = -aggregate(J)

Letters: N groups, G responses a group, B = N * G rows (the rows of a group adjacent), T tokens.
Masked tokens and the rows of invalid groups take no part, whatever stands there. Source: arXiv 2510.02561;
the clipping, KL estimators and aggregations are those of GRPO, DAPO, Dr. GRPO and GSPO.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import RankInputs, TokenInputs
from rlaif_fast.loss.options import LOG_RATIO_LIMIT, LossOptions
from rlaif_fast.loss.reference.rank_penalty import rank_penalty


class TokenLoss(NamedTuple):
    """What a backend returns for a batch of token log-probabilities.

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
    """Return the log-probability of each response, per token ("mean") or in all ("sum"), without gradient."""
    total = logps.detach().where(mask, 0.0).sum(-1)
    if score == "mean":
        total = total / mask.sum(-1).clamp(min=1)
    return total.view(-1, group_size)


def rank_loss(
    logps: Tensor,  # (B, T) differentiable
    entropy: Tensor | None,  # (B, T) differentiable
    inputs: TokenInputs,
    options: LossOptions,
) -> TokenLoss:
    """Return the loss (see the module's docstring), the advantages it used and its statistics."""
    advantages, oracle_ranks, valid, mask = inputs.advantages, inputs.oracle_ranks, inputs.valid, inputs.mask
    old_logps, ref_logps, sampling_ratio = inputs.old_logps, inputs.ref_logps, inputs.sampling_ratio
    B, T = logps.shape
    zero = logps.new_zeros(())
    mask = logps.new_ones((B, T), dtype=torch.bool) if mask is None else mask
    groups = None
    row_valid = logps.new_ones(B, dtype=torch.bool)
    if oracle_ranks is not None:
        N, G = oracle_ranks.shape
        groups = logps.new_ones(N, dtype=torch.bool) if valid is None else valid
        row_valid = groups.repeat_interleave(G)
        mask = mask & row_valid[:, None]

    # A masked entry may hold anything, NaN too: it is replaced before it meets arithmetic or autograd.
    logps = logps.where(mask, 0.0)
    old = logps.detach() if old_logps is None else old_logps.detach().to(logps.dtype).where(mask, 0.0)
    ref = None if ref_logps is None else ref_logps.detach().to(logps.dtype).where(mask, 0.0)
    entropy = None if entropy is None else entropy.to(logps.dtype).where(mask, 0.0)

    ranking = None
    if oracle_ranks is not None:
        scores = policy_scores(old, mask, oracle_ranks.shape[1], options.score)
        ranking = rank_penalty(RankInputs(scores, oracle_ranks, groups), options)
        advantages = ranking.advantages.reshape(B)
    assert advantages is not None
    A = advantages.detach().to(logps.dtype)
    A = (A[:, None] if A.dim() == 1 else A).expand(B, T).where(mask, 0.0)

    length = mask.sum(-1)
    log_ratio = logps - old
    if options.importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / length.clamp(min=1)[:, None]).expand(B, T)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - options.epsilon_low, 1 + options.epsilon_high)
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    policy = torch.minimum(bounded * A, clipped * A)
    if sampling_ratio is not None:
        policy = policy * sampling_ratio.detach().to(logps.dtype).expand(B, T).where(mask, 0.0)

    kl = None if ref is None else _kl(ref - logps, options.kl)

    weight = token_weights(mask, length, row_valid, inputs.num_items, options, logps.dtype)
    policy_loss = -(policy * weight).sum()
    kl_loss = zero if kl is None else options.beta * (kl * weight).sum()
    entropy_loss = zero if entropy is None else -options.entropy_coef * (entropy * weight).sum()
    loss = policy_loss
    if options.beta != 0.0 and kl is not None:
        loss = loss + kl_loss
    if options.entropy_coef != 0.0 and entropy is not None:
        loss = loss + entropy_loss

    def token_mean(x: Tensor) -> Tensor:
        return (x.to(logps.dtype) * mask).sum() / mask.sum().clamp(min=1)

    def group_mean(x: Tensor) -> Tensor:  # over the valid groups
        assert groups is not None
        return x.sum() / (groups.sum() * x[:1].numel()).clamp(min=1)

    ratio_max = ratio.where(mask, 0.0).max() if ratio.numel() else zero
    stats = [
        policy_loss,
        kl_loss,
        entropy_loss if options.entropy_coef != 0.0 else zero,
        zero if kl is None else token_mean(kl),
        zero if entropy is None else token_mean(entropy),
        token_mean((ratio < 1 - options.epsilon_low) & (A < 0)),
        token_mean((ratio > 1 + options.epsilon_high) & (A > 0)),
        token_mean(ratio),
        ratio_max,
        zero if ranking is None else group_mean(ranking.penalties),
        zero if ranking is None else group_mean(ranking.ndcg),
        zero if ranking is None else group_mean(ranking.kendall_tau),
        zero if ranking is None else group_mean(ranking.top1_agreement),
        zero
        if ranking is None
        else (~ranking.has_signal).to(logps.dtype).mean()
        if len(ranking.ndcg)
        else zero,
        mask.sum(),
    ]
    return TokenLoss(loss, advantages.detach(), torch.stack([s.detach().to(logps.dtype) for s in stats]))


def _kl(
    x: Tensor,  # (B, T) ref_logp - logp
    estimator: str,
) -> Tensor:  # (B, T)
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    x = x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return x.exp() - x - 1


def token_weights(
    mask: Tensor,  # (B, T) bool
    length: Tensor,  # (B,)
    row_valid: Tensor,  # (B,) bool
    num_items: Tensor | None,  # scalar
    options: LossOptions,
    dtype: torch.dtype,
) -> Tensor:  # (B, T)
    """Return what each token counts in the aggregate: grpo 1 / (responses * length), dapo 1 / tokens,
    dr_grpo 1 / (responses * max_completion_length)."""
    items = length.sum() if options.loss_type == "dapo" else row_valid.sum()
    items = (items if num_items is None else num_items).to(dtype).clamp(min=1)
    if options.loss_type == "grpo":
        return mask / (items * length.clamp(min=1)[:, None])
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length is not None
        return mask / (items * options.max_completion_length)
    return mask / items
