"""Any Python function as an oracle."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Ranking, RankRequest, unranked
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.identity import function_digest
from rlaif_fast.plugins import imported

logger = logging.getLogger(__name__)


class CallableOracle:
    """Ranks by a function of the request that returns one number, or None for "cannot judge", per response.

    If the function raises, or returns anything else, the group is invalid with the reason. The first
    traceback is logged, separately for groups with and without clips.

    Args:
        function: The function, or its name as "package.module:function". The verdict cache identifies it by its code
            and whatever it uses from its own module; a string attribute `identity` replaces all that.
        returns: "scores" (higher is better) or "ranks" (lower is better).
    """

    name = "callable"

    def __init__(
        self, *, function: str | Callable[[RankRequest], Sequence[float | None]], returns: str = "scores"
    ) -> None:
        if returns not in ("scores", "ranks"):
            raise UsageError(f"oracle option 'returns' must be 'scores' or 'ranks', got {returns!r}")
        self.function = _import(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise UsageError(f"oracle option 'function' must be a function, got {self.function!r}")
        called = getattr(self.function, "func", self.function)  # of a functools.partial
        if any(map(inspect.iscoroutinefunction, (called, type(called).__call__))):
            raise UsageError(
                f"oracle option 'function' must return its values, and {self.function!r} is async; wrap it in one that "
                "runs it (asyncio.run)"
            )
        self.returns = returns
        self.gives_scores = returns == "scores"
        self._told: set[bool] = set()  # of groups with clips, without

    @cached_property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request.

        Raises:
            UsageError: The function holds a value that has no identity.
        """
        module, name = getattr(self.function, "__module__", ""), getattr(self.function, "__qualname__", "")
        name = name or type(self.function).__qualname__
        return f"callable/2 {module}:{name} {function_digest(self.function)} returns={self.returns}"

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        return [self._rank_one(request) for request in requests]

    def _rank_one(self, request: RankRequest) -> Ranking:
        start = time.perf_counter()
        try:
            values = _checked(self.function(request), len(request.responses))
        except Exception as error:  # other people's code: whatever it raises is this group's failure
            shown = bool(request.clips)
            if shown not in self._told:
                # The blind control asks even a function that needs clips: that failure must not hide another.
                without = "" if shown else ", which was asked without clips"
                logger.exception("the oracle function failed on %r%s", request.id, without)
                self._told.add(shown)
            return unranked(request, f"the oracle function failed: {type(error).__name__}: {error}")
        sign = 1.0 if self.returns == "scores" else -1.0
        ranks = ranks_from_scores([None if value is None else sign * value for value in values])
        scores = tuple(values) if self.gives_scores else None
        return Ranking(ranks, scores=scores, verdicts=tuple(values), seconds=time.perf_counter() - start)


def _checked(values: Any, count: int) -> list[float | None]:
    # mappings and strings iterate over keys and characters, a set has no order
    if isinstance(values, (Mapping, Set, str, bytes)):
        raise TypeError(f"expected a list of {count} values, got a {type(values).__name__}")
    values = list(values)
    if len(values) != count:
        raise ValueError(f"expected {count} values, got {len(values)}")
    numbers = [None if value is None else float(value) for value in values]
    if any(number is not None and math.isnan(number) for number in numbers):
        raise ValueError("a value is NaN; return None for a response that cannot be judged")
    return numbers


def _import(name: str) -> Callable[[RankRequest], Sequence[float | None]]:
    if not name.partition(":")[2]:
        raise UsageError(f"oracle option 'function' must look like 'package.module:function', got {name!r}")
    try:
        return imported(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"oracle option 'function': cannot import {name!r} ({error})") from None
