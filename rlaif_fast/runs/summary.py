"""The values of `summary.json` that reports and comparisons compute with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

OBJECTS = ("by_category", "config", "seconds_by_stage", "sha256", "versions")
NUMBERS = ("peak_rss_bytes", "seconds", "seed")
# Null if no answer was scored.
SHARES = ("final_accuracy", "sft_accuracy", "win_rate")


def unfit(summary: Mapping[str, Any]) -> str:
    """Name a key with a value of a wrong type; "" if all present keys fit."""
    for name, fits in _checked(summary):
        if not fits:
            return name
    return ""


def _checked(summary: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    for name, value in summary.items():
        if name in OBJECTS:
            yield name, isinstance(value, dict)
        elif name in NUMBERS:
            yield name, _is_number(value)
        elif name in SHARES:
            yield name, value is None or _is_number(value)
    yield "notes", isinstance(summary.get("notes", []), list)
    yield "seconds_by_stage", all(map(_is_number, summary.get("seconds_by_stage", {}).values()))
    rows = summary.get("by_category", {}).values()
    yield "by_category", all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
