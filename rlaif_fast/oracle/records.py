"""Requests and rankings as JSON, for the verdict cache, verdict files and the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from rlaif_fast.data.media_keys import CUT_KEYS, MEDIA_KEYS
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Ranking, RankRequest, Verdict

_REFERENCE = ("reference", "answer", "solution")
# Fields of a ranked row or a line of rollouts.jsonl that describe the whole group, not the prompt.
OF_THE_GROUP = frozenset(
    {
        *("responses", "ranks", "oracle_ranks", "policy_ranks", "scores", "advantages", "verdicts"),
        *("tokens", "seconds", "error", "valid", "step"),
    }
)
# Keys of a row that are not metadata: they are fields of the request, or results made from the row.
_OWN = OF_THE_GROUP | {
    *("id", "example_id", "question", "options", "category", "metadata", "system", "confidence"),
    *(*_REFERENCE, *MEDIA_KEYS, *CUT_KEYS),
}
_VERDICT_KEYS = {"order", "ranks", "raw", "error"}


def ranking_to_json(ranking: Ranking) -> dict[str, Any]:
    """A ranking as JSON-ready values; in a verdict, which is for the log, what JSON cannot hold becomes text."""
    return {
        "ranks": list(ranking.ranks),
        "scores": None if ranking.scores is None else list(ranking.scores),
        "confidence": ranking.confidence,
        "verdicts": [_written(asdict(v) if isinstance(v, Verdict) else v) for v in ranking.verdicts],
        "tokens": _written(ranking.tokens),
        "seconds": _written(ranking.seconds),
        "error": ranking.error,
    }


def _written(value: Any) -> Any:
    """NumPy and torch numbers as plain ones, and anything else that JSON cannot hold as a text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _written(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def ranking_from_json(value: Mapping[str, Any]) -> Ranking:
    """The inverse of `ranking_to_json`.

    Raises:
        ValueError: If `value` is not a ranking.
    """
    ranks = value.get("ranks")
    if not isinstance(ranks, list) or not all(
        rank is None or (isinstance(rank, int) and not isinstance(rank, bool)) for rank in ranks
    ):
        raise ValueError("'ranks' must be a list of integers and nulls")
    if any(rank is not None and abs(rank) > 2**53 for rank in ranks):
        raise ValueError("'ranks' holds an integer beyond 2**53, which no float tells from its neighbour")
    scores = value.get("scores")
    if scores is not None and (
        not isinstance(scores, list)
        or len(scores) != len(ranks)
        or not all(score is None or type(score) in (int, float) for score in scores)
    ):
        raise ValueError(f"'scores' must be null or a list of {len(ranks)} numbers and nulls")
    return Ranking(
        ranks=tuple(ranks),
        scores=None if scores is None else tuple(scores),
        confidence=float(value.get("confidence", 1.0)),
        verdicts=tuple(_verdict_from_json(verdict) for verdict in value.get("verdicts", ())),
        tokens=int(value.get("tokens", 0)),
        seconds=float(value.get("seconds", 0.0)),
        error=value.get("error"),
    )


def _verdict_from_json(value: Any) -> Any:
    if not isinstance(value, Mapping) or set(value) != _VERDICT_KEYS:
        return value
    return Verdict(tuple(value["order"]), tuple(value["ranks"]), tuple(value["raw"]), value["error"])


def request_to_json(request: RankRequest) -> dict[str, Any]:
    """Everything in a request that a verdict may depend on: not its id; clips by their content address."""
    return {
        "question": request.question,
        "responses": list(request.responses),
        "clips": [clip.key for clip in request.clips],
        "reference": request.reference,
        "options": list(request.options),
        "category": request.category,
        "metadata": dict(request.metadata),
    }


def request_text(request: RankRequest) -> str:
    """A text that is equal for requests that ask the same, whatever their ids."""
    return content_text(request_to_json(request))


def content_text(value: Any) -> str:
    """A text that is the same for equal values; pictures, arrays and tensors by their content."""
    try:
        return json.dumps(_by_text(value), sort_keys=True, default=_content)
    except (RecursionError, ValueError):  # a value inside itself
        return repr(value)


def _by_text(value: Any) -> Any:
    """`value` with its keys as texts, as in JSON; distinct keys stay distinct."""
    if isinstance(value, Mapping):
        texts = all(isinstance(key, str) for key in value)
        return {key if texts else repr(key): _by_text(item) for key, item in value.items()}
    return [_by_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def _content(value: Any) -> str:
    """A picture or an array by its content: trainers decode it anew for every row."""
    if isinstance(value, Tensor):
        value = value.cpu().numpy()
    if not hasattr(value, "tobytes"):
        return repr(value)
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    return f"{shape} {hashlib.blake2b(value.tobytes(), digest_size=20).hexdigest()}"


def row_responses(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The responses of a row.

    Raises:
        UsageError: If it has no list of at least two texts.
    """
    responses = row.get("responses")
    if (
        not isinstance(responses, list)
        or len(responses) < 2
        or not all(isinstance(response, str) for response in responses)
    ):
        raise UsageError(f"{where}: 'responses' must be a list of at least two texts")
    return tuple(responses)


def row_ranks(row: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """The ranks of a row, under `ranks` (verdict files) or `oracle_ranks` (a run's rollouts.jsonl).

    Raises:
        UsageError: If they are missing, malformed, or not one per response.
    """
    ranks = row.get("ranks", row.get("oracle_ranks"))
    try:
        parsed = ranking_from_json({"ranks": ranks}).ranks
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if len(parsed) != len(row_responses(row, where)):
        raise UsageError(f"{where}: {len(parsed)} ranks for {len(row_responses(row, where))} responses")
    return parsed


def row_confidence(row: Mapping[str, Any], where: str) -> float:
    """The confidence of a row's ranks, in [0, 1]; 1 if the row names none.

    Raises:
        UsageError: If it is not such a number.
    """
    value = row.get("confidence", 1.0)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:
        raise UsageError(f"{where}: 'confidence' must be a number in [0, 1], got {value!r:.60}")
    return float(value)


def row_id(row: Mapping[str, Any]) -> str | None:
    """The name of a row: `id`, or `example_id` in a run's rollouts.jsonl."""
    return next((str(row[key]) for key in ("id", "example_id") if row.get(key) is not None), None)


def row_category(row: Mapping[str, Any]) -> str:
    """The category of a row; "" if it has none."""
    return "" if row.get("category") is None else str(row["category"])


def row_request(row: Mapping[str, Any], where: str, clips: Sequence[Any] = ()) -> RankRequest:
    """A dataset row with `responses` as a request; as in training, other columns are its metadata.

    Raises:
        UsageError: If a field has the wrong type.
    """
    question = row.get("question")
    if not isinstance(question, str):
        raise UsageError(f"{where}: 'question' must be a text")
    reference = next((row[key] for key in _REFERENCE if row.get(key) is not None), None)
    options, metadata = row.get("options") or [], row.get("metadata") or {}
    if reference is not None and not isinstance(reference, str):
        raise UsageError(f"{where}: 'answer' must be a text")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UsageError(f"{where}: 'options' must be a list of texts")
    if not isinstance(metadata, dict):
        raise UsageError(f"{where}: 'metadata' must be an object")
    rest = {key: value for key, value in row.items() if key not in _OWN and value is not None}
    return RankRequest(
        id=row_id(row) or where,
        question=question,
        responses=row_responses(row, where),
        clips=tuple(clips),
        reference=reference,
        options=tuple(options),
        category=row_category(row),
        metadata={**rest, **metadata},
    )
