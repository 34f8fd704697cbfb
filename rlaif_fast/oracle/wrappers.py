"""Oracles around another oracle: controls for experiments, and a circuit breaker."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rlaif_fast.errors import Outage, UsageError, require
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, counters, gives_scores, rank_all

T = TypeVar("T")

WINDOW = 64  # groups that the circuit breaker looks back, by default
FIRST_GROUPS = 8  # a judge that fails all of this many at the start stops the run at once


class OracleFailedError(Outage):
    """Too many groups could not be ranked; the run stops rather than learn from what is left."""


class AroundOracle:
    """What an oracle that wraps another passes on."""

    def __init__(self, inner: Oracle) -> None:
        self.inner = inner

    @property
    def gives_scores(self) -> bool:
        """Whether the inner oracle gives scores; a wrapper that changes the ranks changes the scores too."""
        return gives_scores(self.inner)

    def stats(self) -> dict[str, float]:
        """The inner oracle's own figures."""
        return counters(self.inner)


class ShuffledOracle(AroundOracle):
    """Another oracle's ranks and scores shuffled within each group: the control that must teach nothing.

    Args:
        inner: The oracle whose ranks are shuffled; the number of its ties, abstentions and failures does not
            change.
        seed: Seed of the shuffle; each request derives its own from it, its id and its responses.
    """

    name = "shuffled"

    def __init__(self, inner: Oracle, *, seed: int = 0) -> None:
        super().__init__(inner)
        self.seed = seed

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        return f"shuffled/1 seed={self.seed} ({identity_of(self.inner)})"

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        return [self._shuffle_one(*pair) for pair in zip(requests, rank_all(self.inner, requests))]

    def _shuffle_one(self, request: RankRequest, ranking: Ranking) -> Ranking:
        scores = None if ranking.scores is None else self._shuffle(request, ranking.scores)
        return dataclasses.replace(ranking, ranks=self._shuffle(request, ranking.ranks), scores=scores)

    def _shuffle(self, request: RankRequest, values: Sequence[T]) -> tuple[T, ...]:
        shuffled = list(values)
        request_generator(self.seed, request).shuffle(shuffled)
        return tuple(shuffled)


class CircuitBreaker(AroundOracle):
    """Stops the run when too many of the last groups could not be ranked.

    Args:
        inner: The oracle to watch.
        max_invalid_fraction: Share of the window that may fail, in [0, 1].
        window: How many of the last groups are looked at. Until half of it is filled, the run stops only if the
            judge failed all of the first eight groups.
    """

    def __init__(self, inner: Oracle, *, max_invalid_fraction: float = 0.5, window: int = WINDOW) -> None:
        number = isinstance(max_invalid_fraction, (int, float)) and not isinstance(max_invalid_fraction, bool)
        if not (number and 0.0 <= max_invalid_fraction <= 1.0):
            raise UsageError(f"max_invalid_fraction must be in [0, 1], got {max_invalid_fraction!r}")
        check_window(window)
        super().__init__(inner)
        self.name = inner.name
        self.max_invalid_fraction = max_invalid_fraction
        self._window: deque[str | None] = deque(maxlen=window)

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request; the breaker changes nothing."""
        return identity_of(self.inner)

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request.

        Raises:
            OracleFailedError: If more than `max_invalid_fraction` of the last window failed.
        """
        rankings = rank_all(self.inner, requests)
        self._window.extend(ranking.failure for ranking in rankings)
        failures = [error for error in self._window if error is not None]
        share = len(failures) / max(1, len(self._window))
        half = (self._window.maxlen or 0) / 2
        judged = len(self._window) >= half or (share == 1.0 and len(self._window) >= FIRST_GROUPS)
        if judged and share > self.max_invalid_fraction:
            reason = " ".join(failures[-1].split())  # other people's errors may have many lines
            raise OracleFailedError(
                f"the oracle {self.name!r} could not rank {len(failures)} of the last {len(self._window)} "
                f"groups (at most {self.max_invalid_fraction:.0%} may fail); last reason: {reason}. "
                "Check the judge, or raise max_invalid_fraction"
            )
        return rankings


def check_window(window: object) -> None:
    """Raise `UsageError` unless a circuit breaker can look back this many groups."""
    whole = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    require(whole, "window", "a whole number of at least 1", window)


def oracles_in(oracle: Any) -> Iterator[Any]:
    """An oracle and those it is made of."""
    yield oracle
    for inner in (getattr(oracle, "inner", None), *(getattr(oracle, "members", None) or ())):
        if inner is not None:
            yield from oracles_in(inner)


def identity_of(oracle: Oracle) -> str:
    """What an oracle's verdicts depend on besides the request: its `identity`, or else its name."""
    return str(getattr(oracle, "identity", oracle.name))


def request_generator(seed: int | str, request: RankRequest) -> random.Random:
    """A random generator that depends only on the seed, the request's id and its responses."""
    digest = hashlib.sha256("\x1f".join((str(seed), request.id, *request.responses)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))
