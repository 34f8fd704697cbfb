"""Files of records: JSON lines, and values that JSON can represent."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.outputs import write_atomically


def plain(value: Any) -> Any:
    """Turn a value into one that JSON can represent: tensors become numbers and lists, NaN and infinity None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if hasattr(value, "tolist"):  # torch.Tensor, numpy.ndarray and numpy scalars
        return plain(value.tolist())
    raise TypeError(f"value: expected something JSON can hold, got {type(value).__name__}")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; a missing file has none, and a last line cut off by a kill is left out.

    Raises:
        RlaifFastError: A complete line is not a JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RlaifFastError(f"{path}:{number} is not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise RlaifFastError(f"{path}:{number} holds {type(record).__name__}, expected an object")
            yield record


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by `records`, one per line, completely or not at all."""
    write_atomically(path, "".join(json_line(record) for record in records))


def json_line(record: Mapping[str, Any]) -> str:
    """One line of a `.jsonl` file."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
