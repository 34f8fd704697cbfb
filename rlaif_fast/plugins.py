"""Additions to our tables by other packages: entry points of the groups `rlaif_fast.oracles`, `.decoders`, `.samplers`
and `.algorithms`; a class in a plain file is named by its location, "module:Name"."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import reduce
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rlaif_fast.errors import UsageError, nearest


def plugins(kind: str) -> dict[str, EntryPoint]:
    """Entry points of the group `rlaif_fast.<kind>`, by name."""
    return {point.name: point for point in entry_points(group=f"rlaif_fast.{kind}")}


def find(kind: str, name: str, own: Mapping[str, Any], *, also: Iterable[str] = ()) -> Any:
    """The entry called `name` in our own table or in another package.

    Args:
        kind: "oracles", "decoders", "samplers" or "algorithms".
        name: What to look up, first in our own table; or "module:Name" of something that Python can import.
        own: Our table; an entry "module:Name" is imported when it is looked up.
        also: Names that are accepted elsewhere, for the message.

    Raises:
        UsageError: The name is unknown, or there is nothing to import.
    """
    if name in own:
        return imported(own[name]) if isinstance(own[name], str) else own[name]
    if ":" in name:
        try:
            return imported(name)
        except (ImportError, AttributeError, ValueError) as error:
            expected = "'module:Name' that Python can import"
            raise UsageError(
                f"{kind.removesuffix('s')}: expected {expected}, got {name!r}: {error}"
            ) from error
    others = plugins(kind)
    if name in others:
        return others[name].load()
    known = sorted({*own, *others, *also})
    hint = nearest(name, known)
    raise UsageError(f"unknown {kind.removesuffix('s')} {name!r}{hint} Known: {', '.join(known)}")


def imported(place: str) -> Any:
    """The object at "module:Name"; the name may have dots.

    Raises:
        ImportError, AttributeError, ValueError: There is none.
    """
    module, _, name = place.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))
