"""What a loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rlaif_fast.loss.inputs import TokenInputs
from rlaif_fast.loss.options import RANKING_STATS, STATS, LossOptions


class LossOutput(NamedTuple):
    """A loss and what it was made of.

    Attributes:
        loss: Scalar, differentiable.
        advantages: (B,), or as they were given; detached.
        stats: Scalars by name, detached and on the device: `loss/policy`, `clip_low`, `clip_high`,
            `ratio_mean`, `ratio_max` and `tokens` always; `loss/kl` and `kl` with `ref_logps`; `entropy`
            where it is known and `loss/entropy` with `entropy_coef`; `penalty`, `ndcg`, `kendall_tau`,
            `top1_agreement` and `no_signal` with `oracle_ranks`. Under TRL's names also `clip_ratio/low_min` and
            `clip_ratio/high_max`, the extremes of a response's share (take the minimum and the maximum over
            processes), and `clip_ratio/region_mean`, the share of the tokens clipped on either side.
    """

    loss: Tensor
    advantages: Tensor
    stats: dict[str, Tensor]


def named(
    closed: tuple[Tensor, Tensor, Tensor],  # loss, advantages, stats (len(STATS),)
    inputs: TokenInputs,
    options: LossOptions,
    entropy_known: bool,
    extra: dict[str, Tensor],
) -> LossOutput:
    """Name the statistics whose inputs were given, and add those that were made beforehand."""
    loss, advantages, stats = closed
    absent: list[str] = []
    if inputs.ref_logps is None:
        absent += ["loss/kl", "kl"]
    if not entropy_known:
        absent += ["entropy"]
    if options.entropy_coef == 0.0:
        absent += ["loss/entropy"]
    if inputs.oracle_ranks is None:
        absent += RANKING_STATS
    named = {name: value for name, value in zip(STATS, stats.detach().unbind()) if name not in absent}
    named["clip_ratio/region_mean"] = named["clip_low"] + named["clip_high"]
    return LossOutput(loss, advantages, named | extra)
