"""Checks that the options of an oracle have the types it declares, and are large enough."""

from __future__ import annotations

import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    Mapping: "an object",
    type(None): "null",
}


def check_types(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options whose type differs from what the oracle declares; it checks non-JSON types itself.

    Args:
        name: The oracle's name.
        factory: What builds it; a class may have `options_class`, the dataclass of its `more_options`.
        options: By name.

    Raises:
        UsageError: A value is of another type, or NaN.
    """
    built: Any = vars(factory).get("__init__", factory) if isinstance(factory, type) else factory
    hints = typing.get_type_hints(built)
    more = getattr(factory, "options_class", None)
    hints = {**(typing.get_type_hints(more) if more else {}), **hints}
    for key, value in options.items():
        kinds = _kinds(hints.get(key, Any))
        if all(kind in _WORDS for kind in kinds) and not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds))
            raise UsageError(f"oracle {name!r}: option {key!r}: expected {expected}, got {value!r:.60}")


def check_least(least: int, **options: float) -> None:
    """Refuse options below `least`.

    Raises:
        UsageError: For the first of them.
    """
    for name, value in options.items():
        if not value >= least:
            raise UsageError(f"oracle option {name!r} must be at least {least}, got {value}")


def check_json(**options: Any) -> None:
    """Refuse options that cannot be sent as JSON.

    Raises:
        UsageError: For the first of them.
    """
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"oracle option {name!r} must be JSON, got {value!r:.60}: {error}") from None


def check_unread(where: str, factory: Callable[..., Any], **options: Any) -> None:
    """Refuse options that differ from the defaults of `factory` where nothing reads them.

    Raises:
        UsageError: For the first of them.
    """
    parameters = inspect.signature(factory).parameters
    for name, value in options.items():
        if value != parameters[name].default:
            raise UsageError(f"oracle option {name!r} is not read {where}; leave it out, got {value!r:.60}")


def _kinds(hint: Any) -> list[Any]:
    """The types that an annotation allows, without their parameters."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [typing.get_origin(hint) or hint]


def _fits(value: Any, kind: type) -> bool:
    if kind is Path:
        return isinstance(value, (str, Path))
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, Integral)
    if kind is float:
        return isinstance(value, Real) and not math.isnan(value)
    return isinstance(value, kind)
