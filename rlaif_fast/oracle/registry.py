"""Names of oracles: ours and those of other packages (entry-point group `rlaif_fast.oracles`)."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.oracle.wrappers import CircuitBreaker

ENTRY_POINT_GROUP = "rlaif_fast.oracles"

# Modules are imported on use, so that an oracle's libraries are needed by those who ask for it alone.
_BUILTIN = {
    "reference": "rlaif_fast.oracle.reference:ReferenceOracle",
    "noisy": "rlaif_fast.oracle.wrappers:NoisyOracle",
    "shuffled": "rlaif_fast.oracle.wrappers:ShuffledOracle",
}


def oracle_names() -> list[str]:
    """Every name that `build_oracle` knows, sorted."""
    return sorted({*_BUILTIN, *_plugins()})


def build_oracle(
    name: str,
    *,
    inner: str | Mapping[str, Any] | None = None,
    max_invalid_fraction: float | None = 0.5,
    window: int = 64,
    **options: Any,
) -> Oracle:
    """Build an oracle by name.

    Args:
        name: One of `oracle_names()`.
        inner: For an oracle around another one ("noisy", "shuffled", ...): the other's name, or a mapping
            with `name` and its options.
        max_invalid_fraction: Stop the run when more of the last `window` groups could not be ranked; None
            never does.
        window: How many groups the circuit breaker looks back.
        **options: The oracle's own; see its class.

    Returns:
        The oracle, behind a `CircuitBreaker` unless `max_invalid_fraction` is None.

    Raises:
        UsageError: If the name or an option is unknown.
    """
    factory = _factory(name)
    arguments: list[Oracle] = []
    if _takes_inner(factory):
        if inner is None:
            raise UsageError(f"oracle {name!r} wraps another oracle; name it with option 'inner'")
        arguments.append(_build_inner(inner))
    elif inner is not None:
        raise UsageError(f"oracle {name!r} wraps no other oracle; drop option 'inner'")
    _check_options(name, factory, options)
    oracle = factory(*arguments, **options)
    if not isinstance(oracle, Oracle):
        raise UsageError(f"oracle {name!r} has no 'name' and 'rank'; see rlaif_fast.oracle.Oracle")
    if max_invalid_fraction is None:
        return oracle
    return CircuitBreaker(oracle, max_invalid_fraction=max_invalid_fraction, window=window)


def _build_inner(inner: str | Mapping[str, Any]) -> Oracle:
    if isinstance(inner, str):
        return build_oracle(inner, max_invalid_fraction=None)
    if not isinstance(inner, Mapping) or "name" not in inner:
        raise UsageError(f"oracle option 'inner' must be a name or a mapping with 'name', got {inner!r}")
    return build_oracle(**{"max_invalid_fraction": None, **inner})


def _factory(name: str) -> Callable[..., Oracle]:
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    plugins = _plugins()
    if name in plugins:
        return plugins[name].load()
    close = difflib.get_close_matches(name, oracle_names(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"unknown oracle {name!r}{hint} Known: {', '.join(oracle_names())}")


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _takes_inner(factory: Callable[..., Oracle]) -> bool:
    return "inner" in inspect.signature(factory).parameters


def _check_options(name: str, factory: Callable[..., Oracle], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [key for key in parameters if key not in ("inner", "self")]
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(
                f"oracle {name!r} has no option {key!r}{hint} Known: {', '.join(known) or 'none'}"
            )
    missing = [k for k in known if parameters[k].default is parameters[k].empty and k not in options]
    if missing:
        raise UsageError(f"oracle {name!r} needs option {missing[0]!r}")
