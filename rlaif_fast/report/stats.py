"""How certain a measured accuracy is: intervals for a share, and for a difference on the same examples."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, TypeVar

import numpy as np

CONFIDENCE = 0.95  # of the intervals
RESAMPLES = 10_000  # of a bootstrap
MAX_DRAWN = 2**20  # bootstrap indices held in memory at once
MAX_ROWS = 40  # of a figure; a thousand take minutes and gigabytes to draw, and nobody reads them


@dataclass(frozen=True)
class Interval:
    """An estimate and the two-sided interval around it."""

    mean: float
    low: float
    high: float

    @property
    def is_point(self) -> bool:
        """Whether both ends coincide: a bootstrap of examples that all changed alike, or of one video, says nothing."""
        return self.low == self.high


def wilson_interval(correct: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the Wilson score interval of a share.

    Unlike the normal approximation it stays in [0, 1] and is right for a handful of examples and at 0 or n
    correct.

    Args:
        correct: Examples answered right.
        n: Examples, at least 1.
        confidence: Coverage, in (0, 1).

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if not 0 <= correct <= n:
        raise ValueError(f"correct: expected 0 to n = {n}, got {correct}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected in (0, 1), got {confidence}")
    return _wilson(correct / n, n, confidence)


def share_interval(right: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Return the share of right answers and its 95% interval, allowing for dependence between answers about one video.

    It is Wilson's interval for the number of independent answers with the same variance. If all answers are right, or
    all wrong, nothing shows how far those of a video agree, and each video counts as one answer.

    Args:
        right: 1 or 0 for each example, at least one; between them for a tie.
        clusters: What each example belongs to, such as its video.

    Source: L. Kish, "Survey sampling", 1965 (the design effect); E. L. Korn and B. I. Graubard, "Confidence intervals
    for proportions with small expected number of positive counts estimated from survey data", 1998.
    """
    scores = np.asarray(right, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"right: expected a list of length >= 1, got shape {scores.shape}")
    index = _numbered(clusters, len(scores))
    sums, sizes = np.bincount(index, weights=scores), np.bincount(index)
    n, videos, share = len(scores), len(sizes), float(scores.mean())
    independent = float(videos)
    if videos > 1 and 0 < share < 1:
        between = ((sums - share * sizes) ** 2).sum() * videos / (videos - 1)
        within = n * share * (1 - share) * n / (n - 1)  # expected if answers were independent
        independent = min(n, n * within / between) if between > 0 else n
    return _wilson(share, independent, CONFIDENCE)


def _wilson(share: float, n: float, confidence: float) -> Interval:
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends the bound is exactly the share; rounding must not push it across.
    return Interval(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the mean change from `before` to `after` on the same examples and its 95% bootstrap interval.

    Args:
        before: Score of each example, such as 0 or 1.
        after: Score of the same examples, in the same order.
        clusters: What each example belongs to, such as its video: questions about one video are not
            independent, so whole videos are drawn. None draws examples.
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if change.ndim != 1 or change.size == 0:
        raise ValueError(f"before, after: expected two lists of one length >= 1, got shape {change.shape}")
    index = np.arange(len(change)) if clusters is None else _numbered(clusters, len(change))
    sums, sizes = np.bincount(index, weights=change), np.bincount(index)
    generator = np.random.default_rng(0)
    means: list[np.ndarray] = []
    at_once = max(1, MAX_DRAWN // len(sums))
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return percentile_interval(float(change.mean()), np.concatenate(means))


def _numbered(clusters: Sequence[Hashable], n: int) -> np.ndarray:  # (n,)
    """The cluster index of each of n examples; clusters are numbered as they first appear."""
    if len(clusters) != n:
        raise ValueError(f"clusters: expected {n} entries, got {len(clusters)}")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters])


def percentile_interval(mean: float, draws: np.ndarray) -> Interval:
    """Return the interval of a mean between percentiles of its bootstrap draws (RESAMPLES,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


class Asked(Protocol):
    """Something measured on `n` questions."""

    @property
    def n(self) -> int: ...


Row = TypeVar("Row", bound=Asked)


def most_asked(rows: Sequence[Row]) -> list[Row]:
    """The rows that a figure shows, in their order: all, or the `MAX_ROWS` with the most questions.

    Among rows with equally many questions the first are shown, so their order must not depend on how well they did.
    """
    chosen = heapq.nlargest(MAX_ROWS, range(len(rows)), key=lambda place: rows[place].n)
    return [rows[place] for place in sorted(chosen)]


def left_out(rows: Sequence[Asked], what: str = "categories") -> str:
    """What `most_asked` leaves out, to be added to a title; "" if nothing."""
    return f", the {MAX_ROWS} of {len(rows):,} {what} with the most questions" if len(rows) > MAX_ROWS else ""
