"""The oracle protocol: anything that can order responses from best to worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rlaif_fast.video.base import Clip


@dataclass(frozen=True)
class RankRequest:
    """One group to rank: a question about some clips and the G responses the policy sampled for it.

    Attributes:
        id: Name of the request, unique within a batch.
        question: The question, as the policy was asked it (without the options).
        responses: The G responses, in sampling order. They are untrusted text.
        clips: The decoded media the question is about, in order of appearance; may be empty.
        reference: The reference answer, where the dataset has one.
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
class Ranking:
    """An oracle's verdict on one group.

    Attributes:
        ranks: G entries; 0 is best, equal numbers are ties, None is a response that could not be judged.
        scores: G entries, higher is better, from an oracle that gives scores (see `gives_scores`); else None. What
            stands where the rank is None is not read.
        confidence: How far the verdict is to be trusted, in [0, 1].
        verdicts: The raw verdicts it was made from (judge texts, scores), for the log.
        tokens: Judge tokens spent.
        seconds: Time spent.
        error: Why the group could not be ranked; None where it could. A group with an error has no ranks.
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
        """Whether at least two responses were ranked, so that the group can teach anything."""
        return self.error is None and sum(rank is not None for rank in self.ranks) >= 2


@runtime_checkable
class Oracle(Protocol):
    """Orders the responses of each request; never raises for one it cannot judge (see `Ranking.error`).

    An oracle may also have `gives_scores` (bool, False where missing: whether its valid rankings carry `scores`),
    `identity` (what a cached verdict depends on beside the request) and `stats()` (counts for the log).
    """

    name: str

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        ...


def gives_scores(oracle: Oracle) -> bool:
    """Whether every valid ranking of the oracle carries `scores` beside its ranks."""
    return bool(getattr(oracle, "gives_scores", False))
