"""Replaces the reference answers of rows by a model's, to learn from what another model says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_fast.data.answers import letter_of, settle_options, split_target
from rlaif_fast.data.converters import TAG, id_of
from rlaif_fast.data.errors import RowError
from rlaif_fast.data.forms import check_form
from rlaif_fast.data.media_keys import MEDIA_KEYS, NAMES
from rlaif_fast.data.published import named_video, unfold
from rlaif_fast.data.reader import MediaFiles
from rlaif_fast.data.schema import option_letters
from rlaif_fast.data.sources import rows_of
from rlaif_fast.errors import UsageError, writing
from rlaif_fast.outputs import check_output, write_atomically


class Labelled(NamedTuple):
    """How many rows were written, and how many were left out for each reason."""

    written: int
    missing: int  # no prediction
    cut_off: int  # a prediction that did not end within its budget
    outside: int  # a prediction that names none of the row's options


def label(file: Path, predictions: Path, out: Path, *, media_root: Path | None = None) -> Labelled:
    """Write the rows of `file` that have a prediction, with the prediction as their `answer`.

    Keys that describe the reference answer are dropped: `metadata.form` if the prediction does not match it, and
    `process` and `solution`, the reasoning before it.

    Args:
        file: JSONL in the native format, one question per row.
        predictions: What `rlaif_fast.evaluate --output` wrote for the same file.
        out: JSONL to write; relative media paths are rewritten to start from its folder.
        media_root: Folder that those of `file` start from; by default its own.

    Returns:
        Rows written and left out.

    Raises:
        UsageError: A file cannot be read, `out` is one of the two input files, a row asks more than one question, an
            id occurs twice, no row has a prediction, or a prediction has no row.
    """
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    out = check_output("OUT", out, [file, predictions])
    said: dict[str, str] = {}
    unfinished: set[str] = set()
    for number, row in _objects(predictions, "example_id", "prediction"):
        if row["example_id"] in said:
            raise UsageError(f"{predictions}:{number}: {row['example_id']!r:.60} has a prediction already")
        said[row["example_id"]] = row["prediction"]
        if row.get("finished") is False:
            unfinished.add(row["example_id"])
    lines, missing, cut_off, outside, met = [], 0, 0, 0, set()
    for number, row in _objects(file, "question"):
        name = _id(file, number, row)
        if name in met:
            raise UsageError(f"{file}:{number}: the id {name!r:.60} stands twice")
        met.add(name)
        text = said.get(name)
        if text is None or not text.strip():
            missing += 1
            continue
        if name in unfinished:
            cut_off += 1
            continue
        answered = _answered(file, number, row, text)
        if answered is None:
            outside += 1
            continue
        _move_media(answered, media_root or file.parent, out.parent)
        if not _fits(answered):
            answered["metadata"] = {k: value for k, value in answered["metadata"].items() if k != "form"}
        lines.append(json.dumps(answered, ensure_ascii=False) + "\n")
    if not lines:
        what = "prediction for"
        if outside:
            what = "prediction that names an option of"
        elif cut_off:
            what = "prediction that ends within its budget (raise max_completion_length) for"
        raise UsageError(f"{predictions}: it holds no {what} a row of {file}")
    if unknown := [name for name in said if name not in met]:
        raise UsageError(
            f"{predictions}: {len(unknown)} of {len(said)} predictions are of no row of {file}, such as "
            f"{unknown[0]!r:.60}; give what was predicted for this file"
        )
    with writing(out):
        write_atomically(out, "".join(lines))
    return Labelled(len(lines), missing, cut_off, outside)


def _id(file: Path, number: int, row: Mapping[str, Any]) -> str:
    """The id that the reader gives a row of a file."""
    try:
        return id_of(row) or f"{file.stem}:{number}"
    except RowError as error:
        raise UsageError(f"{file}:{number}: {error}") from None


def _answered(file: Path, number: int, row: Mapping[str, Any], text: str) -> dict[str, Any] | None:
    """The row with a prediction as its answer; None if the row has options and the prediction names none.

    The policy was asked for a letter, so a letter is the option's label, even if it is another option's text.
    """
    try:
        answered = dict(
            unfold(
                {key: value for key, value in row.items() if key not in ("process", "solution")}
                | {"answer": None}
            )
        )
        options = settle_options(answered["question"], None, answered.get("options"))[1]
    except RowError as error:
        raise UsageError(f"{file}:{number}: {error}") from None
    if not options:
        return {**answered, "answer": text}
    said = split_target(text, "answer")[0]
    letter = None if said is None else letter_of(said, options, labelled=True)
    if letter is None:
        return None
    index = option_letters(len(options)).index(letter)
    if settle_options(answered["question"], said, answered["options"])[2] != letter:
        text = f"{letter}. {options[index]}"
    return {**answered, "answer": text}


def _fits(row: Mapping[str, Any]) -> bool:
    """Whether the row's answer matches its `metadata.form`, if it has one."""
    metadata = row.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("form") is None:
        return True
    try:
        check_form(metadata["form"], split_target(row["answer"], "answer")[0])
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


def _move_media(row: dict[str, Any], source: Path, target: Path) -> None:
    """Let the paths of a row's media start from another folder, and name a video that is found by its id."""

    def tag(match: re.Match[str]) -> str:
        kind, path = match.groups()
        if path is None:
            return match[0]
        line = "\n" if match[0].endswith("\n") else ""
        return f"<{kind}>{_moved(path.strip(), source, target)}</{kind}>{line}"

    row["question"] = TAG.sub(tag, row["question"])
    for key in MEDIA_KEYS:
        if key in row:
            row[key] = _moved(row[key], source, target)
    if not any(row.get(key) for key in MEDIA_KEYS) and (video := named_video(row)) is not None:
        row["video"] = _moved(MediaFiles(source, check=False).find(video.names), source, target)


def _moved(value: Any, source: Path, target: Path) -> Any:
    """Relative paths rewritten to start from another folder, also in lists and in the mapping of a medium."""
    if isinstance(value, Mapping):
        moved = {key: _moved(value[key], source, target) for key in value if key in NAMES}
        return {**value, **moved}
    if isinstance(value, list):
        return [_moved(item, source, target) for item in value]
    if not isinstance(value, str):
        return value
    value = value.removeprefix("file://")
    if Path(value).is_absolute():
        return value
    return os.path.relpath(source.resolve() / value, target.resolve())
