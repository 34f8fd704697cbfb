"""Verdicts from a file: rankings by people, from another run or from `python -m rlaif_fast.oracle rank`."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rlaif_fast.data.sources import objects_of
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Ranking, RankRequest, unranked
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.records import row_confidence, row_id, row_ranks, row_responses


class ReplayOracle:
    """Looks rankings up by what was asked: the question and the responses, in whatever order.

    If several rows ask the same, the row's `id` (or `example_id`) decides; rows that still contradict each
    other, or give equal texts two ranks, give no verdict. A group that is not in the file gets a `Ranking` with an
    error.

    Args:
        path: JSONL with `question`, `responses`, `ranks` (or `oracle_ranks`, as in a run's rollouts.jsonl),
            optionally `id` and `confidence`, in [0, 1].

    Raises:
        UsageError: The file cannot be read or is empty, or a row of it is wrong.
    """

    name = "replay"

    def __init__(self, *, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: dict[tuple[str, frozenset[str]], list[_Row]] = defaultdict(list)
        digest = hashlib.sha256()
        for where, row in objects_of(self.path):
            responses, ranks = row_responses(row, where), row_ranks(row, where)
            confidence, question = row_confidence(row, where), row.get("question")
            if not isinstance(question, str):
                raise UsageError(f"{where}: 'question' must be a text, which a group is looked up by")
            digest.update(repr((row_id(row), question, responses, ranks, confidence)).encode())
            kept = _Row(row_id(row), responses, ranks, confidence)
            self._rows[question, frozenset(responses)].append(kept)
        if not self._rows:
            raise UsageError(f"{self.path} holds no rows")
        self.identity = f"replay/2 {digest.hexdigest()}"

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        return [self._rank_one(request) for request in requests]

    def _rank_one(self, request: RankRequest) -> Ranking:
        rows = self._rows.get((request.question, frozenset(request.responses)), [])
        # A run names its requests "position:id"; the file's rows carry only the id.
        named = [row for row in rows if row.id in (request.id, request.id.partition(":")[2])]
        rows = named or rows
        if not rows:
            return unranked(request, f"{self.path} holds no verdict on request {request.id!r}")
        found = {
            ranks_from_scores(
                [None if (rank := row.rank_of[text]) is None else -rank for text in request.responses]
            )
            for row in rows
        }
        if len(found) > 1 or any(row.contradicts_itself for row in rows):
            return unranked(request, f"{self.path} contradicts itself on request {request.id!r}")
        return Ranking(found.pop(), min(row.confidence for row in rows))


class _Row:
    def __init__(
        self, name: str | None, responses: Sequence[str], ranks: Sequence[int | None], confidence: float
    ) -> None:
        self.id = name
        self.rank_of = dict(zip(responses, ranks))
        # equal texts
        self.contradicts_itself = any(self.rank_of[text] != rank for text, rank in zip(responses, ranks))
        self.confidence = confidence
