"""The losses of a reward model and of a value model, and the advantages that come of both.

    reward model  -log sigmoid(s_i - s_j) + center (s_i + s_j)^2 for each pair, i preferred to j
    advantages    A_t = sum over k of (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t
    value model   max((V_t - R_t)^2, (clip(V_t, old V_t - c, old V_t + c) - R_t)^2) / 2,  R_t = A_t + old V_t

All work on scalars, one for each response or token: the head that makes them is a vector, without a vocabulary.

Letters: N groups, G responses a group, B responses, T tokens, M packed tokens.
Sources: arXiv 2203.02155 (reward model, Bradley-Terry), 2312.09244 (centring), 1506.02438 (GAE), 1707.06347 (PPO).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLoss(NamedTuple):
    """The loss of a reward model and how it orders the pairs.

    Attributes:
        loss: Scalar, differentiable: a sum over the groups.
        ordered: Number of pairs that the scores order as they are preferred, equal scores half; detached.
        pairs: Number of pairs.
    """

    loss: Tensor
    ordered: Tensor
    pairs: Tensor


def bradley_terry_loss(
    scores: Tensor,  # (N, G)
    preferred: Tensor,  # (N, G, G) bool
    *,
    center: float = 0.0,
    weights: Tensor | None = None,  # (N,)
) -> PairLoss:
    """Return the Bradley-Terry loss of the pairs of each group, with a term that holds the scores near zero.

    Args:
        scores: (N, G) float; differentiable. A score that is in no pair is not read.
        preferred: (N, G, G) bool; [n, i, j] is true where response i of group n is preferred to j.
        center: Weight of (s_i + s_j)^2. Differences of scores do not fix their mean; this term does.
        weights: (N,) float; multiplies the loss of each group. None is 1.

    Returns:
        `PairLoss`. The loss of a group is the mean over its pairs, so that one with many pairs counts no more than one
        with a single pair; a group without a pair adds 0.
    """
    first, second = scores[:, :, None], scores[:, None, :]
    margin = (first - second).where(preferred, 0.0)
    cost = -logsigmoid(margin) + center * (first + second).where(preferred, 0.0).square()
    pairs = preferred.sum((1, 2))
    by_group = cost.where(preferred, 0.0).sum((1, 2)) / pairs.clamp(min=1)
    if weights is not None:
        by_group = by_group * weights
    ordered = ((margin > 0) + 0.5 * (margin == 0)).where(preferred, 0.0).sum()
    return PairLoss(by_group.sum(), ordered.detach(), pairs.sum())


def generalized_advantages(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    """Return the generalized advantage estimates (B, T) of the tokens of some responses; 0 off the mask.

    Args:
        rewards: (B, T) float, the reward of each token.
        values: (B, T) float, the value of the state in which each token was drawn.
        mask: (B, T) bool, true on the tokens of each response, which begin at 0; after the last one the value is 0.
        gamma: Discount in [0, 1].
        lam: How far ahead to look, in [0, 1]: 0 trusts the next value alone, 1 trusts the rewards alone.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    advantages = torch.zeros_like(values)
    later_value = later = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        later = rewards[:, t] + gamma * later_value - values[:, t] + gamma * lam * later
        advantages[:, t], later_value = later, values[:, t]
    return advantages.where(mask, 0.0)


def clipped_value_loss(
    values: Tensor,  # (M,)
    old_values: Tensor,  # (M,)
    returns: Tensor,  # (M,)
    *,
    clip: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Return the value loss of each token (M,), and where the clipped term is the larger one (M,) bool.

    Args:
        values: (M,) float; differentiable.
        old_values: (M,) float, when the responses were drawn.
        returns: (M,) float, what is to be predicted.
        clip: How far a value may move from the old one before its gradient is 0; above 0.
    """
    near = torch.clamp(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return torch.maximum(plain, clipped) / 2, clipped > plain


def whitened(advantages: Tensor, total: float, squares: float, count: float) -> Tensor:
    """Return advantages with mean 0 and variance 1 over a batch.

    Args:
        advantages: Some of the batch.
        total: Sum over the whole batch.
        squares: Sum of the squares.
        count: Their number.
    """
    mean = total / max(count, 1.0)
    variance = max(squares - count * mean**2, 0.0) / max(count - 1.0, 1.0)
    return (advantages - mean) / (variance + 1e-8) ** 0.5
