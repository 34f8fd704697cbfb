"""What other packages add to our tables: entry points of the groups `rlaif_fast.oracles`, `.decoders`, `.samplers`,
`.algorithms`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rlaif_fast.errors import UsageError


def plugins(kind: str) -> dict[str, EntryPoint]:
    """Entry points of the group `rlaif_fast.<kind>`, by name."""
    return {point.name: point for point in entry_points(group=f"rlaif_fast.{kind}")}


def find(kind: str, name: str, own: Mapping[str, Any], *, also: Iterable[str] = ()) -> Any:
    """The entry called `name` of our own table or of another package.

    Args:
        kind: "oracles", "decoders", "samplers" or "algorithms".
        name: What to look up; our own entries come first.
        own: Our table.
        also: Names that are understood elsewhere, for the message.

    Raises:
        UsageError: There is none of that name.
    """
    if name in own:
        return own[name]
    others = plugins(kind)
    if name in others:
        return others[name].load()
    known = sorted({*own, *others, *also})
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise UsageError(f"unknown {kind.removesuffix('s')} {name!r}{hint} Known: {', '.join(known)}")
