"""Preference pairs from rankings: a chosen response and a rejected one, as JSON rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, Literal

from rlaif_fast.oracle.records import OF_THE_GROUP, row_ranks, row_responses

Which = Literal["best_worst", "all"]


def best_and_worst(ranks: Sequence[int | None]) -> tuple[int, int] | None:
    """Places of the best and the worst response, the first of any that tie; None if no two differ."""
    judged = {place: rank for place, rank in enumerate(ranks) if rank is not None}
    if len(set(judged.values())) < 2:
        return None
    return min(judged, key=lambda i: (judged[i], i)), min(judged, key=lambda i: (-judged[i], i))


def ordered_pairs(ranks: Sequence[int | None], which: Which) -> list[tuple[int, int]]:
    """Places (chosen, rejected) of the pairs of a group: of the best and the worst, or of any two that differ."""
    if which == "best_worst":
        pair = best_and_worst(ranks)
        return [] if pair is None else [pair]
    judged = [(place, rank) for place, rank in enumerate(ranks) if rank is not None]
    return [(i, j) for (i, better), (j, worse) in permutations(judged, 2) if better < worse]


def pair_rows(row: Mapping[str, Any], where: str, which: Which) -> Iterator[dict[str, Any]]:
    """The pairs of a ranked row: the row's prompt fields, `chosen`, `rejected`, their `ranks`, and `source`.

    Two responses with the same text are never a pair, however they are ranked.

    Args:
        row: As `python -m rlaif_fast.oracle rank` writes it, or as in a run's rollouts.jsonl.
        where: "file:line", for messages and `source`.
        which: "best_worst" (at most one pair per row) or "all".

    Raises:
        UsageError: The row has no responses or no ranks.
    """
    responses, ranks = row_responses(row, where), row_ranks(row, where)
    prompt = {name: value for name, value in row.items() if name not in OF_THE_GROUP}
    for chosen, rejected in ordered_pairs(ranks, which):
        if responses[chosen] != responses[rejected]:
            yield prompt | {
                "chosen": responses[chosen],
                "rejected": responses[rejected],
                "ranks": [ranks[chosen], ranks[rejected]],
                "source": where,
            }
