"""Imperfect feedback: another oracle's verdicts, corrupted in the ways that judges and reward models err.

Scores and ranks come from the same corrupted values, so that two algorithms differ only in how they use them.
Every draw depends only on the seed, the request's id and its responses; equal responses stay equal. In a run the id
begins with the group's place in its batch, so that two groups of one question draw differently.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, rank_all
from rlaif_fast.oracle.fusion import preferences, ranks_from_scores
from rlaif_fast.oracle.wrappers import AroundOracle, identity_of, oracles_in, request_generator

Corruption = Callable[[list[float], float, random.Random], list[float]]
TAIL_FREEDOM = 1.5  # degrees of freedom of the heavy tails: the variance is infinite
OUTLIER_SIZE = 10.0
LISTWISE_NOISE = 0.3  # deviation of each reading's noise; the pull of the first slot is as large


def gaussian(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Add noise of standard deviation `strength`."""
    return [score + rng.gauss(0.0, strength) for score in scores]


def heavy_tails(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Add `strength` times Student's t with 1.5 degrees of freedom: mostly small, sometimes enormous."""

    def draw() -> float:
        chi_squared = rng.gammavariate(TAIL_FREEDOM / 2, 2.0)
        return rng.gauss(0.0, 1.0) / math.sqrt(max(chi_squared, 1e-12) / TAIL_FREEDOM)

    return [score + strength * draw() for score in scores]


def warp(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Pass the scores through an increasing function drawn for this prompt: the order stays, the scale does not.

    The function is exp(k x), shifted and scaled; k is drawn from a normal distribution of deviation `strength`.
    """
    k, shift, scale = rng.gauss(0.0, strength), rng.gauss(0.0, 1.0), math.exp(rng.gauss(0.0, 1.0))
    if abs(k) < 1e-3:
        return [shift + scale * score for score in scores]
    return [shift + scale * math.copysign(1.0, k) * math.exp(k * score) for score in scores]


def grades(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Round scores of [0, 1] to `strength` grades, 1 the worst: a judge's 1 to 5, with its ties."""
    steps = strength - 1.0
    return [1.0 + round(min(max(score, 0.0), 1.0) * steps) for score in scores]


def flips(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Flip each pairwise comparison with probability `strength`; the score is the share of comparisons won."""
    wins = [0.0] * len(scores)
    for i in range(len(scores)):
        for j in range(i):
            flipped = rng.random() < strength
            if scores[i] == scores[j]:
                wins[i] += 0.5
                wins[j] += 0.5
            else:
                wins[i if (scores[i] > scores[j]) != flipped else j] += 1.0
    return [win / max(1, len(scores) - 1) for win in wins]


def slot_bias(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Favour what is read first: a listwise judge that adds up to `strength` to the first slot and subtracts it from
    the last; slots are assigned at random."""
    return [score + bias for score, bias in zip(scores, _biases(len(scores), strength, rng))]


def slot_bias_debiased(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """The same judge asked twice, the second time with the slots reversed, and averaged."""
    biases = _biases(len(scores), strength, rng)
    reversed_biases = [-bias for bias in biases]
    return [score + (one + two) / 2 for score, one, two in zip(scores, biases, reversed_biases)]


def listwise(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """A listwise judge that reads the group in `strength` orders, every second one the reverse of the one before.

    Each reading adds noise of deviation 0.3 and the pull of `slot_bias`, and gives only ranks. The score is the share
    of comparisons won over all readings (Borda).
    """
    readings: list[tuple[int | None, ...]] = []
    pull: list[float] = []
    for number in range(round(strength)):
        reverse = number % 2 == 1
        pull = [-bias for bias in pull] if reverse else _biases(len(scores), LISTWISE_NOISE, rng)
        noisy = [score + bias + rng.gauss(0.0, LISTWISE_NOISE) for score, bias in zip(scores, pull)]
        readings.append(ranks_from_scores(noisy))
    wins, _ = preferences(readings)
    return [sum(own) / (len(readings) * max(1, len(scores) - 1)) for own in wins]


def outliers(scores: list[float], strength: float, rng: random.Random) -> list[float]:
    """Replace a share `strength` of the scores by values of +-10, far outside [0, 1]."""
    return [
        rng.choice((-OUTLIER_SIZE, OUTLIER_SIZE)) if rng.random() < strength else score for score in scores
    ]


def _biases(count: int, strength: float, rng: random.Random) -> list[float]:
    slots = rng.sample(range(count), count)
    return [strength * (1.0 - 2.0 * slot / max(1, count - 1)) for slot in slots]


# Name -> (what it does, its usual strength).
CORRUPTIONS: Mapping[str, tuple[Corruption, float]] = {
    "gaussian": (gaussian, 0.3),
    "heavy_tails": (heavy_tails, 0.15),
    "warp": (warp, 3.0),
    "grades": (grades, 5.0),
    "flips": (flips, 0.3),
    "slot_bias": (slot_bias, 0.3),
    "slot_bias_debiased": (slot_bias_debiased, 0.3),
    "listwise": (listwise, 2.0),
    "outliers": (outliers, 0.05),
}


class CorruptedOracle(AroundOracle):
    """Another oracle whose scores, about 0 to 1, are corrupted; the ranks follow the corrupted scores.

    If it gives no scores, its ranks are corrupted instead, the best as 1 and the worst as 0, and the
    verdict has no scores either.

    Args:
        inner: The oracle to corrupt.
        kind: One of `CORRUPTIONS`.
        strength: How much; None is the usual strength of that kind.
        seed: Seed of the draws.

    Raises:
        UsageError: The kind is unknown, or the strength is not possible.
    """

    name = "corrupted"

    def __init__(self, inner: Oracle, *, kind: str, strength: float | None = None, seed: int = 0) -> None:
        if kind not in CORRUPTIONS:
            raise UsageError(f"feedback: expected exact, {', '.join(CORRUPTIONS)}, got {kind!r}")
        self._corrupt, usual = CORRUPTIONS[kind]
        strength = usual if strength is None else strength
        bounds = {
            "flips": (0.0, 1.0),
            "outliers": (0.0, 1.0),
            "grades": (2.0, 100.0),
            "listwise": (1.0, 16.0),
        }
        least, most = bounds.get(kind, (0.0, math.inf))
        if not (math.isfinite(strength) and least <= strength <= most):
            raise UsageError(f"feedback_strength: expected {least:g} to {most:g} for {kind}, got {strength}")
        if kind == "listwise" and strength != round(strength):
            raise UsageError(
                f"feedback_strength: expected a whole number of orders for listwise, got {strength}"
            )
        super().__init__(inner)
        self.kind = kind
        self.strength = strength
        self.seed = seed
        # Nested corrupted oracles of the same seed draw separate numbers; otherwise both would add the same noise.
        self.stream = sum(isinstance(oracle, CorruptedOracle) for oracle in oracles_in(inner))

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        stream = f" stream={self.stream}" if self.stream else ""
        own = f"kind={self.kind} strength={self.strength} seed={self.seed}{stream}"
        return f"corrupted/1 {own} ({identity_of(self.inner)})"

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        return [self._rank_one(*pair) for pair in zip(requests, rank_all(self.inner, requests))]

    def _rank_one(self, request: RankRequest, ranking: Ranking) -> Ranking:
        if not ranking.valid:
            return ranking
        clean = {
            text: score
            for text, score, rank in zip(
                request.responses, ranking.scores or _scores_of(ranking.ranks), ranking.ranks
            )
            if rank is not None and score is not None
        }
        rng = request_generator(f"{self.seed}/{self.stream}" if self.stream else self.seed, request)
        try:
            corrupted = dict(zip(clean, self._corrupt(list(clean.values()), self.strength, rng)))
        except OverflowError:
            raise UsageError(
                f"feedback: {self.kind} takes scores of about 0 to 1; request {request.id!r} has {list(clean.values())}"
            ) from None
        scores = tuple(
            corrupted[text] if rank is not None else None
            for text, rank in zip(request.responses, ranking.ranks)
        )
        given = None if ranking.scores is None else scores
        return dataclasses.replace(ranking, ranks=ranks_from_scores(scores), scores=given)


def _scores_of(ranks: Sequence[int | None]) -> list[float | None]:
    """Ranks as scores: 1 for the best, 0 for the worst."""
    worst = max(rank for rank in ranks if rank is not None) or 1
    return [None if rank is None else 1.0 - rank / worst for rank in ranks]
