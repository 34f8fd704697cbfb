"""How open answers are graded: yes or no, and 0 to 5, by any oracle (the protocol of Video-ChatGPT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle, RankRequest, rank_all
from rlaif_fast.oracle.extract import final_part
from rlaif_fast.oracle.grading import MAX_GRADE, Grade
from rlaif_fast.oracle.registry import build_oracle
from rlaif_fast.policy.vocabulary import CLOSES

# Options of a judge that grading does not read: how orders are drawn and fused, and what is shown besides words.
OF_RANKINGS = (
    *("protocol", "orders", "fusion", "min_confidence", "use_reference", "use_clips", "seed"),
    *("frames_per_clip", "image_size"),
)


@runtime_checkable
class Grader(Protocol):
    """An oracle that can grade answers itself."""

    def grade(self, requests: Sequence[RankRequest]) -> list[Grade | None]:
        """Grade the one response of each request against its reference answer; None if that failed."""
        ...


@dataclass(frozen=True)
class RankingGrader:
    """Grades by ranking an answer against the reference answer: right if it is not below it.

    Attributes:
        oracle: Ranks.
    """

    oracle: Oracle

    def grade(self, requests: Sequence[RankRequest]) -> list[Grade | None]:
        """See `Grader`; a right answer scores 5, any other 0."""
        pairs = [replace(r, responses=(r.responses[0], r.reference or "")) for r in requests]
        grades: list[Grade | None] = []
        for ranking in rank_all(self.oracle, pairs):
            ours, theirs = ranking.ranks
            if not ranking.valid or ours is None or theirs is None:
                grades.append(None)
            else:
                grades.append(Grade(ours <= theirs, MAX_GRADE if ours <= theirs else 0))
        return grades


def stated(text: str, *, reasons: bool) -> str:
    """What a response says after its reasoning; "" if it says nothing.

    Args:
        text: The response.
        reasons: Whether the chat template opened the reasoning; a response that does not close it then says nothing.
    """
    return "" if reasons and CLOSES not in text else final_part(text) or ""


def grade_answers(
    grader: Grader, answers: Sequence[tuple[Example, str]], *, reasons: bool = False
) -> list[Grade | None]:
    """Grade answers to open questions only by their words, as published: the frames are not shown.

    Args:
        grader: Grades the answers.
        answers: Questions with their answers. Only what follows the reasoning, if any, is graded; an answer that says
            nothing there is wrong, without asking the grader.
        reasons: See `stated`.

    Returns:
        A grade for each, None if it could not be graded.
    """
    said = [stated(text, reasons=reasons) for _, text in answers]
    grades: list[Grade | None] = [None if text.strip() else Grade(False, 0) for text in said]
    requests = {
        place: RankRequest(
            id=f"{place}:{example.id}",
            question=example.question,
            responses=(said[place],),
            reference=example.answer,
            category=example.category,
            metadata=example.metadata,
        )
        for place, (example, _) in enumerate(answers)
        if grades[place] is None
    }
    if requests:
        for place, grade in zip(requests, grader.grade(list(requests.values()))):
            grades[place] = grade
    return grades


def make_grader(name: str, options: Mapping[str, Any]) -> Grader:
    """Build the grader from an oracle's name and options.

    Raises:
        UsageError: An option applies only to rankings, or is unknown.
    """
    refuse_options(options, ("cache", "window", "max_invalid_fraction"))
    oracle = build_oracle(name, max_invalid_fraction=None, **options)
    if not isinstance(oracle, Grader):
        return RankingGrader(oracle)
    refuse_options(options, OF_RANKINGS)
    return oracle


def refuse_options(options: Mapping[str, Any], of_rankings: Sequence[str]) -> None:
    """Refuse options that no grade depends on.

    Raises:
        UsageError: There is one.
    """
    for option in of_rankings:
        if option in options:
            raise UsageError(f"judge_options: {option!r} is of rankings, not of grades; leave it out")
