"""The rows of a dataset file, whatever it is: JSONL, a JSON array, CSV, parquet, a Hugging Face `datasets` folder."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from rlaif_fast.data.errors import RowError
from rlaif_fast.data.media_keys import CUT_KEYS
from rlaif_fast.errors import UsageError

MAX_DEPTH = 64  # of nested lists and objects
_CELL_CHARS = 16 << 20  # most of a CSV field
_MARK = b"\xef\xbb\xbf"  # some programs begin UTF-8 with it
TABLES = (".json", ".csv", ".tsv", ".parquet")
# the beginning of a file name
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"(\xb5/\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
_HALVES = re.compile("[\ud800-\udfff]")  # halves of characters
_BLANK, _COMMA = re.compile(r"\s*"), re.compile(r"\s*,?\s*")
# Columns of texts, whatever a cell looks like: an answer may be "[1, 2]".
_TEXT_CELLS = {"question", "problem", "query", "answer", "solution", "response", "system", "process"}


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line or row number, row); a row that cannot be read comes as a `RowError`.

    Raises:
        UsageError: The file itself cannot be read.
    """
    source: Iterator[tuple[int, Any]]
    suffix = path.suffix.casefold()
    if path.is_dir():
        source = enumerate(_arrow_folder(path), 1)
    elif suffix == ".parquet":
        source = enumerate(_parquet([path]), 1)
    elif suffix in (".csv", ".tsv"):
        source = _csv(path, "\t" if suffix == ".tsv" else ",")
    else:
        source = _json(path)
        if (answers := answers_of(path)) is not None:
            source = _answered(source, answers)
    for number, row in source:
        yield number, row if isinstance(row, RowError) else _checked(row)


def answers_of(questions: Path) -> Path | None:
    """The file with the answers to another file's questions, if there is one: test_a.json beside test_q.json."""
    answers = questions.with_stem(f"{questions.stem.removesuffix('_q')}_a")
    both = questions.stem.endswith("_q") and questions.is_file() and answers.is_file()
    return answers if both else None


def objects_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", row); rows after the first on a line also have their number, so that no two share a place.

    Raises:
        UsageError: The file cannot be read, or one of its rows is wrong or not a JSON object.
    """
    last, path = 0, path.expanduser()
    for number, (line, row) in enumerate(rows_of(path), 1):
        where = f"{path}:{line}" if line != last else f"{path}:{line}, row {number}"
        last = line
        if isinstance(row, RowError):
            raise UsageError(f"{where}: {row}")
        if not isinstance(row, dict):
            raise UsageError(f"{where}: expected one JSON object, got {type(row).__name__}")
        yield where, row


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, in order; links to folders are followed, and each folder is read once.

    Hidden files and folders are left out: a Mac, Jupyter and downloads put copies and notes of their own into them.
    """
    found: list[Path] = []
    walked: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _checked(row: Any) -> Any:
    """The row, or a `RowError` that says why no file of a run could hold it."""
    waiting = [(row, 1, "")]
    while waiting:
        value, depth, column = waiting.pop()
        if isinstance(value, (dict, list)) and depth > MAX_DEPTH:
            return RowError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            waiting += [(key, depth + 1, column) for key in value]
            waiting += [(item, depth + 1, column or key) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1, column) for item in value]
        elif isinstance(value, str) and not value.isascii() and _HALVES.search(value):
            return RowError(f"{value!r:.60} holds half of a character (an unpaired surrogate)")
        elif isinstance(value, float) and not math.isfinite(value):
            return RowError(f"{value} is no number; leave the key out")
        elif isinstance(value, bytes):
            return RowError(
                f"{column}: holds bytes; write those of a file to a file and give its path, or leave the column out"
            )
    return row


def read_text(path: Path) -> str:
    """The text of a file beside a dataset.

    Raises:
        UsageError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def _answered(questions: Iterator[tuple[int, Any]], file: Path) -> Iterator[tuple[int, Any]]:
    """The questions joined with a second file by `question_id`: ActivityNet-QA ships test_q and test_a."""
    answers: dict[Any, dict[str, Any]] = {}
    for number, row in _json(file):
        name = row.get("question_id") if isinstance(row, dict) else None
        if not isinstance(name, (str, int)):
            raise UsageError(f"{file}:{number}: expected an answer with a question_id, got {row!r:.60}")
        if name in answers:
            raise UsageError(f"{file}:{number}: the question_id {name!r:.60} stands twice")
        answers[name] = row
    for number, row in questions:
        name = row.get("question_id") if isinstance(row, dict) else None
        if not isinstance(row, dict) or (isinstance(name, (str, int)) and name in answers):
            yield number, row | answers[name] if isinstance(row, dict) else row
        else:
            yield number, RowError(f"question_id {name!r:.60} has no answer in {file.name}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a JSONL file, read line by line, or of one JSON array."""
    try:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(4096), b"")
            begins = next((text for block in blocks if (text := block.removeprefix(_MARK).lstrip())), b"")
            for mark, kind in _PACKED.items():
                if begins.startswith(mark):
                    raise UsageError(f"{path}: is packed by {kind}; unpack it")
            file.seek(0)
            if begins[:1] == b"[":
                yield from _array(path, file.read().removeprefix(_MARK))
                return
            for number, line in enumerate(file, 1):
                raw = (line.removeprefix(_MARK) if number == 1 else line).removesuffix(b"\n")
                if not raw.strip():
                    continue
                try:
                    yield number, _guarded(_DECODER.decode, raw.decode())
                except UnicodeDecodeError as error:
                    yield number, RowError(f"not UTF-8 at byte {error.start}")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the dataset: {error.strerror or error}") from error
    except ValueError as error:  # an impossible path
        raise UsageError(f"{path}: cannot read the dataset: {error}") from error


def _array(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """The rows of one JSON array, each with the line that it starts on."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from error
    at, line, counted, gap = text.index("[") + 1, 1, 0, _BLANK
    while True:
        before = gap.match(text, at)
        assert before is not None  # it also matches the empty string
        at = before.end()
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            if rest := text[at + 1 :].strip():
                yield line, RowError(f"the array ends and {rest!r:.40} follows; it is not read")
            return
        if gap is _COMMA and "," not in before.group():
            yield line, RowError(f"expected a comma, got {text[at : at + 20]!r}; the rest is not read")
            return
        found = _guarded(_DECODER.raw_decode, text, at)
        if isinstance(found, RowError):
            yield line, RowError(f"{found}; the rest is not read")
            return
        row, at = found
        yield line, row
        gap = _COMMA


def _guarded(decode: Callable[..., Any], *given: Any) -> Any:
    """The result of `decode`, or a `RowError` with the reason why it failed."""
    try:
        return decode(*given)
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} at column {error.colno}")
    except RowError as error:
        return error
    except RecursionError:
        return RowError(f"nested more than {MAX_DEPTH} deep")
    except ValueError as error:  # an integer with more digits than Python reads
        return RowError(f"not JSON that can be read: {str(error)[:80]}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise RowError(f"the key {twice!r:.60} stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise RowError(f"{name} is no JSON; leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV file with a header; a cell that holds a JSON list or object is one, an empty one is absent.

    Other cells, all questions and all answers are texts, except the seconds, rates and sizes of `media_keys`, which
    are numbers.
    """
    csv.field_size_limit(_CELL_CHARS)
    try:
        # Decoded at once: if decoded in blocks, an error would give only its position within a block.
        lines = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
            raise UsageError(f"{path}: a column name stands twice in {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                yield reader.line_num, RowError(f"expected {len(reader.fieldnames or ())} fields")
                continue
            yield reader.line_num, {key: _cell(key, value) for key, value in row.items() if value != ""}
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from error
    except csv.Error as error:
        raise UsageError(f"{path}: not CSV after line {reader.line_num} ({error})") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot read the dataset: {error.strerror or error}") from error


def _cell(key: str, value: str) -> Any:
    if key in CUT_KEYS:
        with contextlib.suppress(ValueError):  # what is not a number is refused when it is read
            return float(value)
    if key not in _TEXT_CELLS and value.lstrip()[:1] in ("[", "{"):
        found = _guarded(_DECODER.decode, value)
        return value if isinstance(found, RowError) else found
    return value


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "reading parquet and datasets folders needs pyarrow, which is not installed; "
            "run: pip install 'rlaif-fast[tables]'"
        ) from error
    return pyarrow


def _parquet(paths: list[Path]) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow()
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from _rows_in(batch)
        except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise UsageError(f"{path}: cannot read the dataset: {error}") from error


def _arrow_folder(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset.save_to_disk` folder, or of a folder of parquet files."""
    state = path / "state.json"
    if not state.is_file():
        found = [file for file in files_below(path) if file.suffix == ".parquet"]
        if (path / "dataset_dict.json").is_file():
            raise UsageError(f"{path}: holds several splits; name one of its folders")
        if not found:
            raise UsageError(
                f"{path}: cannot read the dataset: neither a datasets folder (state.json) nor one of parquet files; "
                "name a file"
            )
        if len({match.group(1).casefold() for file in found if (match := _SPLIT.match(file.name))}) > 1:
            raise UsageError(
                f"{path}: holds several splits; name a file, or a folder with the files of one split"
            )
        yield from _parquet(found)
        return
    pyarrow = _pyarrow()
    try:
        names = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        for name in names:
            with pyarrow.memory_map(str(path / name)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from _rows_in(batch)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path}: cannot read the dataset: {error}") from error


def _rows_in(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of part of a table, without their null columns; except for bytes, what JSON lacks becomes text.

    Raises:
        ValueError: Two columns have the same name, or a value has no Python equivalent.
    """
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"a column name stands twice in {names}")
    for row in batch.to_pylist():
        yield {key: _written(value) for key, value in row.items() if value is not None}


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):  # a map is a list of pairs
        return [_written(item) for item in value]
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    return str(value) if isinstance(value, (timedelta, Decimal, UUID)) else value
