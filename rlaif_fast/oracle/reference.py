"""The embedded oracle: ranks responses by rules against the reference answer, with partial credit."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Ranking, RankRequest, unranked
from rlaif_fast.oracle.choices import reference_choice
from rlaif_fast.oracle.extract import compile_extract, final_part
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.scoring import (
    answer_kind,
    form_facts,
    normalise,
    score_choice,
    score_form,
    score_number,
    score_text,
)


class ReferenceOracle:
    """Ranks by the rules of `rlaif_fast.oracle.scoring`: exact, then right facts, then right form, then the
    rest.

    Equal scores tie. A request without a reference answer gets a `Ranking` with an error.

    Args:
        tolerance: Relative tolerance of a numeric answer.
        extract: Regular expression whose first group is the answer inside a longer response, for instance
            r"Answer: (.*)"; a response that it does not match is scored as it is, and the score halved. None takes
            all of it. Within that only the last `<answer>` block, the text after `</think>` or in `\\boxed{}` counts,
            unless the reference has such marks too.
    """

    name = "reference"
    gives_scores = True
    needs_reference = True

    def __init__(self, *, tolerance: float = 0.0, extract: str | None = None) -> None:
        if not 0.0 <= tolerance < 1.0:
            raise UsageError(f"oracle option 'tolerance' must be in [0, 1), got {tolerance}")
        self.tolerance = tolerance
        self._extract = compile_extract(extract)

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        extract = self._extract.pattern if self._extract else None
        return f"reference/6 tolerance={self.tolerance} extract={extract}"

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        return [self._rank_one(request) for request in requests]

    def is_correct(self, request: RankRequest, response: str) -> bool:
        """Whether a response counts as right: exact, the right option or number, or every key fact right."""
        reference, kind = _reference_of(request)
        text, _ = self._answer_of(response, reference)
        if normalise(text) == normalise(reference):
            return True
        if kind == "text":
            return False
        if kind == "form":
            facts = form_facts(request.metadata["form"], text)
            return bool(facts) and facts == form_facts(request.metadata["form"], reference)
        return self._score_by_kind(text, reference, kind, request) >= 0.9

    def _rank_one(self, request: RankRequest) -> Ranking:
        start = time.perf_counter()
        try:
            scores = self._score(request)
        except UsageError as error:
            return unranked(request, str(error))
        return Ranking(
            ranks=ranks_from_scores(scores),
            scores=scores,
            verdicts=tuple(round(score, 6) for score in scores),
            seconds=time.perf_counter() - start,
        )

    def _score(self, request: RankRequest) -> tuple[float, ...]:
        """The score of each response, in [0, 1]."""
        reference, kind = _reference_of(request)
        # Groups hold many repeats once the policy is confident, so each distinct text is scored only once.
        scores = {}
        for response in set(request.responses):
            text, factor = self._answer_of(response, reference)
            scores[response] = factor * self._score_by_kind(text, reference, kind, request)
        return tuple(scores[response] for response in request.responses)

    def _score_by_kind(self, text: str, reference: str, kind: str, request: RankRequest) -> float:
        if kind == "form":
            return score_form(text, reference, request.metadata["form"])
        if kind == "choice":
            if normalise(text) == normalise(reference):
                return 1.0
            answer = reference_choice(reference, request.options)
            assert answer is not None
            return score_choice(text, answer, request.options)
        if kind == "number":
            return score_number(text, reference, self.tolerance)
        return score_text(text, reference)

    def _answer_of(self, response: str, reference: str) -> tuple[str, float]:
        text = response
        if self._extract is not None:
            match = self._extract.search(response)
            if match is None:
                return response, 0.5
            text = match.group(1) or ""
        marked = final_part(reference) != reference
        return text if marked else final_part(text) or "", 1.0


def _reference_of(request: RankRequest) -> tuple[str, str]:
    if request.reference is None or not request.reference.strip():
        raise UsageError(f"request {request.id!r} has no reference answer; the reference oracle needs one")
    return request.reference, answer_kind(request.reference, request.options, request.metadata.get("form"))
