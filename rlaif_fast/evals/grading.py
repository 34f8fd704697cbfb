"""How open answers are graded: yes or no, and 0 to 5, by any oracle (the protocol of Video-ChatGPT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle, RankRequest, rank_all
from rlaif_fast.oracle.grading import MAX_GRADE, Grade
from rlaif_fast.oracle.registry import build_oracle


@runtime_checkable
class Grader(Protocol):
    """An oracle that grades answers by itself."""

    def grade(self, requests: Sequence[RankRequest]) -> list[Grade | None]:
        """Grade the one response of each request against its reference answer; None where it could not."""
        ...


@dataclass(frozen=True)
class RankingGrader:
    """Grades by ranking an answer against the reference answer: right where it is not below it.

    Attributes:
        oracle: Ranks.
    """

    oracle: Oracle

    def grade(self, requests: Sequence[RankRequest]) -> list[Grade | None]:
        """See `Grader`; a right answer has 5, another has 0."""
        pairs = [replace(r, responses=(r.responses[0], r.reference or "")) for r in requests]
        grades: list[Grade | None] = []
        for ranking in rank_all(self.oracle, pairs):
            ours, theirs = ranking.ranks
            if not ranking.valid or ours is None or theirs is None:
                grades.append(None)
            else:
                grades.append(Grade(ours <= theirs, MAX_GRADE if ours <= theirs else 0))
        return grades


def make_grader(name: str, options: Mapping[str, Any]) -> Grader:
    """The grader that an oracle's name and options make.

    Raises:
        UsageError: An option is the oracle's in training alone, or unknown.
    """
    for option in ("cache", "window", "max_invalid_fraction"):
        if option in options:
            raise UsageError(f"judge_options: {option!r} is of rankings, not of grades; leave it out")
    return grader_of(build_oracle(name, max_invalid_fraction=None, **options))


def grader_of(oracle: Oracle) -> Grader:
    """The oracle where it grades by itself, else one that has it rank."""
    return oracle if isinstance(oracle, Grader) else RankingGrader(oracle)
