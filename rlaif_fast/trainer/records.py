"""Groups as the JSON records of rollouts.jsonl and samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

from rlaif_fast.algorithms.group import Group
from rlaif_fast.data.schema import Example


def rollout_records(groups: Sequence[Group], step: int) -> list[dict]:
    """One JSON-ready record a group."""
    records = []
    for group in groups:
        scores = group.scores.tolist()
        order = sorted(scores, reverse=True)
        records.append(
            {
                "step": step,
                **example_record(group.prompt.example),
                "responses": list(group.texts),
                "oracle_ranks": list(group.ranking.ranks),
                "policy_ranks": [order.index(score) for score in scores],
                "advantages": [round(value, 4) for value in group.advantages.tolist()],
                "valid": group.ranking.valid,
                "confidence": group.ranking.confidence,
            }
        )
    return records


def example_record(example: Example) -> dict:
    """The keys that identify an example."""
    return {
        "example_id": example.id,
        "category": example.category,
        "video": example.videos[0] if example.videos else (example.images[0] if example.images else None),
        "question": example.question,
        "options": list(example.options),
        "answer": example.answer,
        "metadata": dict(example.metadata),
    }
