"""The oracle protocol: anything that can order responses from best to worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from rlaif_fast.errors import require
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.video.base import Clip


@dataclass(frozen=True)
class RankRequest:
    """One group to rank: a question about some clips and the G responses the policy sampled for it.

    Attributes:
        id: Name of the request, unique within a batch.
        question: The question, as the policy was asked it (without the options).
        responses: The G responses, in sampling order. They are untrusted text.
        clips: The decoded media the question is about, in order of appearance; may be empty.
        reference: The reference answer, if the dataset has one.
        options: The choices of a multiple-choice question, "A" first; empty for open questions.
        category: The category of the question.
        metadata: Whatever else the dataset row carried.
    """

    id: str
    question: str
    responses: tuple[str, ...]
    clips: tuple[Clip, ...] = ()
    reference: str | None = None
    options: tuple[str, ...] = ()
    category: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a judge said about one shown order.

    Attributes:
        order: The responses in order of appearance, without duplicate texts; empty if each was
            judged on its own.
        ranks: The ranks it gave, G entries; None where it gave none (and for the left-out duplicates).
        raw: Its replies.
        error: Why there are no ranks; None if there are.
    """

    order: tuple[int, ...]
    ranks: tuple[int | None, ...]
    raw: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Ranking:
    """An oracle's verdict on one group.

    Attributes:
        ranks: G entries; 0 is best, equal numbers are ties, None is a response that could not be judged.
        scores: G entries, higher is better, from an oracle that gives scores (see `gives_scores`); else None. Entries
            whose rank is None are not read.
        confidence: How far to trust the verdict, in [0, 1].
        verdicts: The raw verdicts it was made from (judge texts, scores), for the log.
        tokens: Judge tokens spent.
        seconds: Time spent.
        error: Why the group could not be ranked; None if it was. A group with an error has no ranks.
    """

    ranks: tuple[int | None, ...]
    scores: tuple[float | None, ...] | None = field(default=None, kw_only=True)
    confidence: float = 1.0
    verdicts: tuple[Any, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def valid(self) -> bool:
        """Whether at least two responses were ranked; the group can teach nothing otherwise."""
        return self.error is None and sum(rank is not None for rank in self.ranks) >= 2

    @property
    def failure(self) -> str | None:
        """Why the group can teach nothing; None if it is valid."""
        return None if self.valid else self.error or "fewer than two responses could be judged"


def unranked(request: RankRequest, error: str, **more: Any) -> Ranking:
    """The verdict on a group that could not be ranked; `more` are other fields of it."""
    return Ranking((None,) * len(request.responses), 0.0, error=error, **more)


@runtime_checkable
class Oracle(Protocol):
    """Orders the responses of each request; never raises for one it cannot judge (see `Ranking.error`).

    An oracle may also have `gives_scores` (bool, False if missing: whether its valid rankings carry `scores`),
    `identity` (what a cached verdict depends on besides the request) and `stats()` (counts for the log).
    """

    name: str

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        ...


def gives_scores(oracle: Oracle) -> bool:
    """Whether every valid ranking of the oracle carries `scores` beside its ranks."""
    return bool(getattr(oracle, "gives_scores", False))


def counters(oracle: Oracle) -> dict[str, float]:
    """What the oracle itself has counted since the start (requests, faults by kind, cache hits)."""
    return getattr(oracle, "stats", dict)()


def rank_all(oracle: Oracle, requests: Sequence[RankRequest], **more: Any) -> list[Ranking]:
    """Have an oracle rank requests, and check the rankings it returns.

    Only the order of ranks counts: ranks that begin at 1, have gaps or are fractions become dense integers from 0.

    Args:
        oracle: The oracle.
        requests: The groups.
        **more: Further arguments of its `rank`.

    Returns:
        One ranking per request, in their order.

    Raises:
        UsageError: The oracle returned too many or too few results, or one that is not a `Ranking`; or in a ranking the
            ranks or scores are not one per response, a rank is not a finite number, the score of a ranked response is
            not a number, or the confidence is not in [0, 1].
    """
    returned = oracle.rank(requests, **more)
    listed = returned is None or isinstance(returned, Iterable)
    require(listed, f"oracle {oracle.name}", "a list of rankings", returned)  # a coroutine is not a list
    rankings = list(returned or ())
    require(
        len(rankings) == len(requests), f"oracle {oracle.name}", f"{len(requests)} rankings", len(rankings)
    )
    return [_checked(oracle, *pair) for pair in zip(requests, rankings)]


def _checked(oracle: Oracle, request: RankRequest, ranking: Ranking) -> Ranking:
    name = f"oracle {oracle.name}, request {request.id}"
    require(isinstance(ranking, Ranking), name, "a Ranking", ranking)
    ranks, scores = ranking.ranks, ranking.scores
    count = len(request.responses)
    require(len(ranks) == count, name, f"{count} ranks", len(ranks))
    finite = all(rank is None or (isinstance(rank, Real) and math.isfinite(rank)) for rank in ranks)
    require(finite, name, "ranks that are numbers or None", ranks)
    require(scores is None or len(scores) == count, name, f"{count} scores", scores)
    if scores is not None:
        said = [None if rank is None else score for rank, score in zip(ranks, scores)]
        given = all(rank is None or _is_number(score) for rank, score in zip(ranks, said))
        require(given, name, "a score for each ranked response", scores)
        scores = tuple(None if score is None else float(score) for score in said)
    sure = ranking.confidence
    require(_is_number(sure) and 0.0 <= sure <= 1.0, name, "a confidence in [0, 1]", sure)
    dense = ranks_from_scores([None if rank is None else -rank for rank in ranks], 0.0)
    return replace(ranking, ranks=dense, scores=scores, confidence=float(sure))


def _is_number(value: Any) -> bool:
    """Whether a value is one number, NumPy's and torch's included, and not NaN."""
    single = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    return single and not math.isnan(float(value))
