"""Rows with a model's answers in place of the reference ones: to learn from what another model says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaif_fast.data.converters import id_of
from rlaif_fast.data.errors import RowError
from rlaif_fast.data.forms import check_form
from rlaif_fast.data.media_keys import NAMES
from rlaif_fast.data.sources import rows_of
from rlaif_fast.errors import UsageError, writing
from rlaif_fast.outputs import check_output, write_atomically

_PATHS = ("video", "videos", "image", "images")


def label(file: Path, predictions: Path, out: Path) -> tuple[int, int]:
    """Write the rows of `file` that have a prediction, with it as their `answer`.

    `metadata.form` describes the reference answer, so it is left out where the prediction does not match it.

    Args:
        file: JSONL in the native format, one question a row; media are named by `video(s)` and `image(s)`.
        predictions: What `rlaif_fast.evaluate --output` wrote for the same file.
        out: JSONL to write; relative media paths are made to start from its folder.

    Returns:
        Rows written, and rows without a prediction, which are left out.

    Raises:
        UsageError: A file cannot be read, `out` is one of the two that are read, a row asks more than one question, an
            id stands twice, no row has a prediction, or a prediction has no row.
    """
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    out = check_output("OUT", out, [file, predictions])
    said: dict[str, str] = {}
    for number, row in _objects(predictions, "example_id", "prediction"):
        if row["example_id"] in said:
            raise UsageError(f"{predictions}:{number}: {row['example_id']!r:.60} has a prediction already")
        said[row["example_id"]] = row["prediction"]
    lines, missing, met = [], 0, set()
    for number, row in _objects(file, "question"):
        name = _id(file, number, row)
        if name in met:
            raise UsageError(f"{file}:{number}: the id {name!r:.60} stands twice")
        met.add(name)
        text = said.get(name)
        if text is None or not text.strip():
            missing += 1
            continue
        for key in _PATHS:
            if key in row:
                row[key] = _moved(row[key], file.parent, out.parent)
        if not _fits(row, text):
            row["metadata"] = {key: value for key, value in row["metadata"].items() if key != "form"}
        lines.append(json.dumps({**row, "answer": text}, ensure_ascii=False) + "\n")
    if not lines:
        raise UsageError(f"{predictions}: it holds no prediction for a row of {file}")
    if unknown := [name for name in said if name not in met]:
        raise UsageError(
            f"{predictions}: {len(unknown)} of {len(said)} predictions are of no row of {file}, such as "
            f"{unknown[0]!r:.60}; give what was predicted for this file"
        )
    with writing(out):
        write_atomically(out, "".join(lines))
    return len(lines), missing


def _id(file: Path, number: int, row: Mapping[str, Any]) -> str:
    """What the reader calls a row of a file."""
    try:
        return id_of(row) or f"{file.stem}:{number}"
    except RowError as error:
        raise UsageError(f"{file}:{number}: {error}") from None


def _fits(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer matches the row's `metadata.form`; without one it does."""
    metadata = row.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("form") is None:
        return True
    try:
        check_form(metadata["form"], answer)
    except RowError:
        return False
    return True


def _objects(file: Path, *keys: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in rows_of(file):
        if isinstance(row, RowError):
            raise UsageError(f"{file}:{number}: {row}")
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in keys):
            raise UsageError(f"{file}:{number}: expected an object with the texts {', '.join(keys)}")
        yield number, dict(row)


def _moved(value: Any, source: Path, target: Path) -> Any:
    """Relative paths from another folder on, in lists and beside the keys of a medium too."""
    if isinstance(value, Mapping):
        moved = {key: _moved(value[key], source, target) for key in value if key in NAMES}
        return {**value, **moved}
    if isinstance(value, list):
        return [_moved(item, source, target) for item in value]
    if not isinstance(value, str) or Path(value).is_absolute():
        return value
    return os.path.relpath(source.resolve() / value, target.resolve())
