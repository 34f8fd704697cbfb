"""Oracles by name: ours and those of other packages (entry-point group `rlaif_fast.oracles`)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError, nearest, require
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.oracle.option_types import check_types
from rlaif_fast.oracle.wrappers import WINDOW, CircuitBreaker
from rlaif_fast.plugins import find, plugins

_SECRET = re.compile(
    r"(?i)(api[-_]?key|secret|password|authorization|(access|auth|bearer|hf)[-_]?token)(?!_env$)"
)

# Modules are imported on use, so that only those who use an oracle need its libraries.
_BUILTIN = {
    "reference": "rlaif_fast.oracle.reference:ReferenceOracle",
    "embedding": "rlaif_fast.oracle.embedding:EmbeddingOracle",
    "local": "rlaif_fast.oracle.local:LocalOracle",
    "api": "rlaif_fast.oracle.api:ApiOracle",
    "reward_model": "rlaif_fast.oracle.reward_model:RewardModelOracle",
    "callable": "rlaif_fast.oracle.callable:CallableOracle",
    "replay": "rlaif_fast.oracle.replay:ReplayOracle",
    "ensemble": "rlaif_fast.oracle.ensemble:EnsembleOracle",
    "corrupted": "rlaif_fast.oracle.feedback:CorruptedOracle",
    "shuffled": "rlaif_fast.oracle.wrappers:ShuffledOracle",
}


SHARED_OPTIONS = ("cache", "max_invalid_fraction", "window")  # options of `build_oracle` itself


def oracle_names() -> list[str]:
    """Every name that `build_oracle` knows, sorted."""
    return sorted({*_BUILTIN, *plugins("oracles")})


def refuse_secrets(options: Any) -> None:
    """Refuse options that hold a key or password, before they are written to any file.

    Raises:
        UsageError: If an option's name suggests one, at any depth; the value is not shown.
    """
    if isinstance(options, (list, tuple)):
        for value in options:
            refuse_secrets(value)
    elif isinstance(options, Mapping):
        for key, value in options.items():
            if _SECRET.search(str(key)):
                raise UsageError(
                    f"oracle option {key!r}: keys do not belong in a configuration; put it into an environment "
                    "variable and name that with option 'api_key_env'"
                )
            refuse_secrets(value)


def build_oracle(
    name: str,
    *,
    cache: str | Path | None = None,
    max_invalid_fraction: float | None = 0.5,
    window: int | None = None,
    **options: Any,
) -> Oracle:
    """Build an oracle by name.

    Args:
        name: One of `oracle_names()`.
        cache: File to keep verdicts in; None keeps none.
        max_invalid_fraction: Stop the run if a larger share of the last `window` groups could not be ranked; None
            never stops it.
        window: How many groups the circuit breaker looks back; None for 64.
        **options: The oracle's own; see its class. An option `inner` (of "corrupted" and "shuffled") is another
            oracle's name, or a mapping of `name` and its options; `members` (of "ensemble") is a list of
            such.

    Returns:
        The oracle; behind a cache if requested, and a `CircuitBreaker` unless
        `max_invalid_fraction` is None.

    Raises:
        UsageError: If the name or an option is unknown, or a value does not fit.
    """
    factory = find_oracle(name, options)
    _check_cache(cache)
    unread = max_invalid_fraction is None and window is not None
    require(not unread, "window", "no value where max_invalid_fraction is null", window)
    if "inner" in options:
        options["inner"] = _nested(name, "inner", options["inner"])
    if "members" in options:
        members = options["members"]
        if isinstance(members, str) or not isinstance(members, Sequence):
            raise UsageError(f"oracle {name!r}: option 'members' must be a list of oracles, got {members!r}")
        options["members"] = [_nested(name, "members", member) for member in members]
    oracle = factory(**options)
    if not isinstance(oracle, Oracle):
        raise UsageError(f"oracle {name!r} has no 'name' and 'rank'; see rlaif_fast.oracle.Oracle")
    if cache is not None:
        from rlaif_fast.oracle.cache import CachedOracle

        oracle = CachedOracle(oracle, path=cache)
    if max_invalid_fraction is not None:
        window = WINDOW if window is None else window
        oracle = CircuitBreaker(oracle, max_invalid_fraction=max_invalid_fraction, window=window)
    return oracle


def find_oracle(name: str, options: Mapping[str, Any]) -> Callable[..., Oracle]:
    """Check an oracle's options and return its factory; nothing is built.

    Raises:
        UsageError: If the name or an option is unknown, or a value has the wrong type.
    """
    refuse_secrets(options)
    factory = find("oracles", name, _BUILTIN)
    own = {key: value for key, value in options.items() if key not in SHARED_OPTIONS}
    _check_options(name, factory, own)
    if name in _BUILTIN:
        check_types(name, factory, own)
    _check_cache(options.get("cache"))
    return factory


def _check_cache(cache: Any) -> None:
    require(cache is None or isinstance(cache, (str, Path)), "cache", "the path of a file", cache)


def _nested(name: str, option: str, value: Any) -> Oracle:
    """An oracle given as itself, by name, or as a mapping of its name and options."""
    if isinstance(value, str):
        return build_oracle(value, max_invalid_fraction=None)
    if isinstance(value, Mapping) and "name" in value:
        return build_oracle(**{"max_invalid_fraction": None, **value})
    if isinstance(value, Oracle):
        return value
    raise UsageError(
        f"oracle {name!r}: option {option!r} must be an oracle's name or a mapping with 'name', got {value!r}"
    )


def _check_options(name: str, factory: Callable[..., Oracle], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    named = {key: p for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    known = list(dict.fromkeys([*named, *getattr(factory, "more_options", ())]))
    open_ended = len(named) < len(parameters) and not hasattr(factory, "more_options")
    for key in options:
        if key not in known and not open_ended:
            raise UsageError(
                f"oracle {name!r} has no option {key!r}{nearest(key, known)} Known: {', '.join(known) or 'none'}"
            )
    missing = [key for key, p in named.items() if p.default is p.empty and key not in options]
    if missing:
        raise UsageError(f"oracle {name!r} needs option {missing[0]!r}")
