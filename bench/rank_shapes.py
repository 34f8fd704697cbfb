"""Uses of an oracle's ranks, compared by `rank_uses.py`: each turns feedback on N groups into (N, G) advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.algorithms import AlgorithmOptions, Verdicts, make_algorithm
from rlaif_fast.oracle.fusion import ranks_from_scores


@dataclass(frozen=True)
class Feed:
    """What a use may read of N groups, (N, G) each.

    Attributes:
        ranks: Of the corrupted scores, 0 is best.
        scores: The corrupted scores.
        order: The policy's own score, higher is more likely; only the order counts.
        logps: Log-probability of each response under the policy, or of its share of the group.
        texts: Place in the group of the first response with the same text.
    """

    ranks: Tensor
    scores: Tensor
    order: Tensor
    logps: Tensor
    texts: Tensor


Use = Callable[[Feed], Tensor]


def same(values: Tensor) -> Tensor:
    """(N, G, G) whether two responses of a group have the same value."""
    return values[:, :, None] == values[:, None, :]


def centred(values: Tensor) -> Tensor:
    """Against the mean of the group."""
    return values - values.mean(1, keepdim=True)


def unit(advantages: Tensor) -> Tensor:
    """Divided by the root mean square of the group, as `scale: group`."""
    return advantages / (advantages.square().mean(1, keepdim=True).sqrt() + 1e-6)


def leave_one_out(values: Tensor) -> Tensor:
    """Against the mean of the others."""
    return values - (values.sum(1, keepdim=True) - values) / (values.shape[1] - 1)


def shared(gain: Callable[[int], float], ranks: Tensor, members: Tensor | None = None) -> Tensor:
    """(N, G) gain of each place, k = 0 the best; responses that tie share the mean gain of their places.

    Args:
        gain: Gain of place k.
        ranks: (N, G), 0 is best.
        members: (N, G) bool, those that take a place; others get what a member of their rank gets.
    """
    others = torch.ones_like(ranks, dtype=torch.bool) if members is None else members
    better = ((ranks[:, None, :] < ranks[:, :, None]) & others[:, None, :]).sum(2)
    level = (same(ranks) & others[:, None, :]).sum(2)
    gains = torch.tensor([gain(k) for k in range(ranks.shape[1])], dtype=torch.float64)
    total = torch.cat((torch.zeros(1, dtype=torch.float64), gains.cumsum(0)))
    return (total[better + level] - total[better]) / level


def paper(k: int) -> float:
    """The gain of GRPO_rank."""
    return 1.0 / ((1 + k) * math.log2(2 + k))


def normal(k: int, count: int = 8) -> float:
    """Normal score of a place (van der Waerden): the quantile that a normal sample of that size has there."""
    return NormalDist().inv_cdf((count - k) / (count + 1))


def firsts(feed: Feed) -> Tensor:
    """(N, G) the first response of each distinct text."""
    return feed.texts == torch.arange(feed.texts.shape[1])


def of_texts(gain: Callable[[int], float], feed: Feed, *, once: bool) -> Tensor:
    """Gains of the distinct texts, centred over texts: equal texts take one place.

    Args:
        gain: Gain of place k.
        feed: The groups.
        once: Whether a text's advantage is divided by the number of its samples, so that each text counts once; else
            the samples are centred instead.
    """
    first = firsts(feed)
    gains = shared(gain, feed.ranks, first)
    if not once:
        return centred(gains)
    mean = gains.where(first, 0.0).sum(1, keepdim=True) / first.sum(1, keepdim=True)
    return (gains - mean) / same(feed.texts).sum(2)


def of_levels(gain: Callable[[int], float], feed: Feed) -> Tensor:
    """Centred gains of the distinct ranks: responses that tie take one place."""
    gains = torch.tensor([gain(k) for k in range(feed.ranks.shape[1])], dtype=torch.float64)
    return centred(gains[feed.ranks])


def plackett_luce(feed: Feed) -> Tensor:
    """Gradient of the log-likelihood of the ranking under the policy with respect to each response's log-probability.

    Each response is drawn against those ranked below it; those that tie are not drawn against each other.
    """
    below = feed.ranks[:, None, :] > feed.ranks[:, :, None]
    itself = torch.eye(feed.ranks.shape[1], dtype=torch.bool)
    chance = feed.logps[:, None, :].masked_fill(~(below | itself), -math.inf).softmax(2)
    return (itself.double() - chance).sum(1)


def soft(feed: Feed) -> Tensor:
    """Mean over the others of tanh((s_i - s_j) / t), t the median difference of the group's unequal scores."""
    gap = feed.scores[:, :, None] - feed.scores[:, None, :]
    size = gap.abs().masked_fill(gap == 0, math.nan).flatten(1).nanmedian(1).values.nan_to_num(1.0)
    return (gap / size[:, None, None]).tanh().mean(2)


def certain(feed: Feed) -> Tensor:
    """`directed` with the rank error only where the oracle is sure: the best and the worst level."""
    gains = shared(paper, feed.ranks)
    own = shared(paper, ranks_of(feed.order))
    penalty = 1.0 - torch.minimum(gains, own) / torch.maximum(gains, own)
    sure = (feed.ranks == 0) | (feed.ranks == feed.ranks.amax(1, keepdim=True))
    return centred(centred(gains) * (1.0 + penalty.where(sure, 0.0)))


def by_levels(feed: Feed) -> Tensor:
    """`oracle`, divided by the root mean square over the distinct levels in place of the samples."""
    gains = centred(shared(paper, feed.ranks))
    count = same(feed.ranks).sum(2)
    spread = (gains.square() / count).sum(1) / (1.0 / count).sum(1)
    return gains / (spread.sqrt()[:, None] + 1e-6)


def ours(feedback: str, **options: Any) -> Use:
    """An algorithm of the package."""
    algorithm = make_algorithm(AlgorithmOptions(**options))

    def use(feed: Feed) -> Tensor:
        verdicts = Verdicts(getattr(feed, feedback), None, None, feed.order)
        return algorithm.advantages(verdicts).advantages

    return use


def gains(gain: Callable[[int], float], scale: Callable[[Tensor], Tensor] = unit) -> Use:
    """Centred gains of the samples' places."""
    return lambda feed: scale(centred(shared(gain, feed.ranks)))


def normal_scores(scale: Callable[[Tensor], Tensor] = unit) -> Use:
    """Normal scores of the samples' places in a group of that size."""
    return lambda feed: gains(partial(normal, count=feed.ranks.shape[1]), scale)(feed)


def root(advantages: Tensor) -> Tensor:
    """Divided by the square root of what `unit` divides by."""
    return advantages / (advantages.square().mean(1, keepdim=True).sqrt() + 1e-6).sqrt()


USES: Mapping[str, Use] = {
    "grpo (z-score)": ours("scores", algorithm="grpo", scale="group"),
    "rloo": ours("scores", algorithm="rloo"),
    "grpo_rank oracle": ours("ranks", algorithm="grpo_rank", advantage="oracle", scale="group"),
    "grpo_rank directed": ours("ranks", algorithm="grpo_rank", advantage="directed", scale="group"),
    "gopo": ours("ranks", algorithm="gopo"),
    "rlrr": ours("ranks", algorithm="rlrr", scale="group"),
    "odrpo": ours("ranks", algorithm="odrpo"),
    "oracle, undivided": ours("ranks", algorithm="grpo_rank", advantage="oracle", scale="none"),
    "oracle, by root": gains(paper, root),
    "oracle, by levels": by_levels,
    "discount 1/log2(2+k)": gains(lambda k: 1 / math.log2(2 + k)),
    "discount 2^-k": gains(lambda k: 0.5**k),
    "first place alone": gains(lambda k: float(k == 0)),
    "win rate": gains(lambda k: -float(k)),
    "win rate, by root": gains(lambda k: -float(k), root),
    "normal scores": normal_scores(),
    "normal, undivided": normal_scores(lambda a: a),
    "normal, by root": normal_scores(root),
    "leave one out": lambda feed: leave_one_out(shared(paper, feed.ranks)),
    "texts share a place": lambda feed: unit(of_texts(paper, feed, once=False)),
    "texts, undivided": lambda feed: of_texts(paper, feed, once=False),
    "texts count once": lambda feed: unit(of_texts(paper, feed, once=True)),
    "Plackett-Luce": plackett_luce,
    "Plackett-Luce, unit": lambda feed: unit(plackett_luce(feed)),
    "directed where sure": lambda feed: unit(certain(feed)),
    "levels": ours("ranks", algorithm="rank_candidates:Levels"),
    "levels, trusted": ours("ranks", algorithm="rank_candidates:TrustedLevels"),
    "levels, divided": lambda feed: unit(of_levels(paper, feed)),
    "levels, evenly spaced": ours("ranks", algorithm="rlrr", scale="none"),
    "first level alone": lambda feed: of_levels(lambda k: float(k == 0), feed),
    "soft comparisons": soft,
    "soft, unit": lambda feed: unit(soft(feed)),
}


def ranks_of(scores: Tensor) -> Tensor:
    """(N, G) dense ranks, 0 for the highest score."""
    return torch.tensor([ranks_from_scores(row) for row in scores.tolist()])
