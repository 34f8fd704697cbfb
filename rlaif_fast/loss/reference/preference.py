"""Losses of preferences from log-probabilities, in plain PyTorch.

    r_i  = beta (sum_t logp_it - sum_t ref_logp_it)                     implicit reward of a response
    DPO  = -mean over pairs of w log sigmoid(r_chosen - r_rejected)                      arXiv 2305.18290
    LiPO = -mean over groups of w sum_{i before j} D_ij log sigmoid(r_i - r_j)           arXiv 2402.01878

Letters: P pairs, N groups, G responses a group, B responses (2 P, each chosen one before its rejected one; or N * G),
T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PREFERENCE_STATS = ("margin", "accuracy", "reward_chosen", "reward_rejected")


def implicit_rewards(
    logps: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    ref_logps_sum: Tensor,  # (B,)
    beta: float,
) -> Tensor:
    """Return r (B,)."""
    total = logps.where(mask, 0.0).sum(-1)
    return beta * (total - ref_logps_sum.to(total.dtype))


def dpo_loss(
    logps: Tensor,  # (B, T) differentiable
    mask: Tensor,  # (B, T) bool
    ref_logps_sum: Tensor,  # (B,)
    beta: float,
    pair_weights: Tensor | None,  # (P,)
    items: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the implicit rewards (B,), and the statistics in the order of PREFERENCE_STATS."""
    rewards = implicit_rewards(logps, mask, ref_logps_sum, beta)
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    cost = -logsigmoid(margin)
    loss = (cost if pair_weights is None else cost * pair_weights).sum() / items
    wins = (margin > 0).to(margin.dtype)
    pairs = max(1, len(margin))
    stats = torch.stack([x.detach().sum() / pairs for x in (margin, wins, chosen, rejected)])
    return loss, rewards.detach(), stats


def lambda_weights(
    labels: Tensor,  # (N, G)
    rewards: Tensor,  # (N, G)
    judged: Tensor | None,  # (N, G) bool
    group_weights: Tensor | None,  # (N,)
) -> Tensor:
    """Return the weight (N, G, G) of each pair [i, j], 0 except where label i is the higher one."""
    rewards = rewards.detach()
    if judged is not None:
        rewards = rewards.masked_fill(~judged, -torch.inf)  # after the others, so that they take no place
    place = rewards.argsort(stable=True, dim=-1, descending=True).argsort(-1) + 1
    gain = torch.exp2(labels.to(rewards.dtype))
    discount = 1 / torch.log1p(place.to(rewards.dtype))
    weights = (gain[:, :, None] - gain[:, None, :]).clamp(min=0)
    weights = weights * (discount[:, :, None] - discount[:, None, :]).abs()
    if judged is not None:
        weights = weights.where(judged[:, :, None] & judged[:, None, :], 0.0)
    return weights if group_weights is None else weights * group_weights[:, None, None]


def ordered_pairs(labels: Tensor, judged: Tensor | None) -> Tensor:  # (N, G), (N, G) bool
    """Return the pairs [i, j] of judged responses whose label i is the higher one, (N, G, G) bool."""
    pairs = labels[:, :, None] > labels[:, None, :]
    return pairs if judged is None else pairs & judged[:, :, None] & judged[:, None, :]


def lipo_loss(
    logps: Tensor,  # (B, T) differentiable
    mask: Tensor,  # (B, T) bool
    ref_logps_sum: Tensor,  # (B,)
    beta: float,
    labels: Tensor,  # (N, G)
    judged: Tensor | None,  # (N, G) bool
    group_weights: Tensor | None,  # (N,)
    items: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the implicit rewards (B,), and the statistics in the order of PREFERENCE_STATS."""
    rewards = implicit_rewards(logps, mask, ref_logps_sum, beta).view(labels.shape)
    compared = rewards if judged is None else rewards.where(judged, 0.0)  # the others may hold anything
    weights = lambda_weights(labels, compared, judged, group_weights)
    margin = compared[:, :, None] - compared[:, None, :]
    loss = -(weights * logsigmoid(margin)).sum() / items
    pairs = ordered_pairs(labels, judged)
    first, second = rewards[:, :, None].expand_as(margin), rewards[:, None, :].expand_as(margin)
    wins = (margin > 0).to(margin.dtype)
    count = pairs.sum().clamp(min=1)
    stats = torch.stack([x.detach().where(pairs, 0.0).sum() / count for x in (margin, wins, first, second)])
    return loss, rewards.detach().flatten(), stats
