"""The advantages of responses: ranks or rewards in, (N, G) out, each kind beside its formula.

Letters: N groups, G responses a group, u gain in the oracle's order, p rank penalty, w penalty_weight. Means
run over the members of a group: the responses that were judged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.options import RankOptions

ZSCORE_EPS = 1e-4  # added to the standard deviation of a group
SCALE_EPS = 1e-6  # added to the root mean square of a group


def directed(u: Tensor, penalty: Tensor, members: Tensor, w: float) -> Tensor:
    """b = u - mean u;  a = b (1 + w p);  A = a - mean a."""
    a = oracle(u, members) * (1 + w * penalty)
    return a - _mean(a, members)


def oracle(u: Tensor, members: Tensor) -> Tensor:
    """A = u - mean u: the oracle's order alone."""
    return u - _mean(u, members)


def paper(penalty: Tensor, members: Tensor) -> Tensor:
    """A = mean p - p, for either of the paper's penalties."""
    return -_centred(penalty, members)


def zscore(reward: Tensor, members: Tensor) -> Tensor:
    """A = (R - mean R) / (std R + 1e-4): plain GRPO."""
    centred = _centred(reward, members)
    freedom = (members.sum(-1, keepdim=True) - 1).clamp(min=1)
    std = (centred.square().where(members, 0.0).sum(-1, keepdim=True) / freedom).sqrt()
    return centred / (std + ZSCORE_EPS)


def without_offset(rewards: Tensor, counting: Tensor | None) -> Tensor:  # (N, G), (N, G) or (N, 1) bool
    """Return rewards minus the smallest of their group, where they differ by little compared with their size.

    A z-score does not change when all rewards of a group shift by the same amount. Without this, the cast to
    float32 and the mean in it would round the differences away.
    """
    wide = torch.promote_types(rewards.dtype, torch.float32)
    x = rewards.to(wide if rewards.is_floating_point() else torch.float64)
    low, high = x, x
    if counting is not None:
        low, high = x.where(counting, torch.inf), x.where(counting, -torch.inf)
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    near = low.isfinite() & (64 * (high - low) < torch.maximum(low.abs(), high.abs()))
    return x - low.where(near, 0.0)


def advantages_of(
    u: Tensor,  # (N, G)
    penalty: Tensor,  # (N, G)
    oracle_ranks: Tensor,  # (N, G); rewards with kind="zscore"
    members: Tensor,  # (N, G) bool
    tied: Tensor,  # (N,) bool, the oracle ties the whole group
    options: RankOptions,
) -> Tensor:  # (N, G)
    """Return the advantages of a kind, scaled where asked."""
    if options.kind in ("paper", "paper_swapped"):
        A = paper(penalty, members)
    else:
        if options.kind == "zscore":
            A = zscore(oracle_ranks, members)
        elif options.kind == "oracle":
            A = oracle(u, members)
        else:
            A = directed(u, penalty, members, options.penalty_weight)
        A = A.masked_fill(tied[:, None], 0.0)  # exact zeros, whatever the mean rounded to
    if options.scale == "group":
        A = A / (_mean(A.square(), members).sqrt() + SCALE_EPS)
    return A


def _centred(x: Tensor, members: Tensor) -> Tensor:  # (N, G)
    """x - mean x, of rewards and penalties of any size.

    The mean is rounded, so the differences from it have a small mean of their own. That is subtracted too; otherwise a
    loss that sums over tokens would accumulate it. What equals the mean keeps its exact zero.
    """
    centred = x - _mean(x, members)
    return centred - _mean(centred, members).where(centred != 0, 0.0)


def _mean(x: Tensor, members: Tensor) -> Tensor:  # (N, G) -> (N, 1)
    return x.where(members, 0.0).sum(-1, keepdim=True) / members.sum(-1, keepdim=True).clamp(min=1)
