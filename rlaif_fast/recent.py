"""A cache of the most recently used values, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentlyUsed(Generic[K, V]):
    """Values by key; the least recently used go first. Not safe for several threads without a lock.

    Args:
        budget: Largest total weight of the values.
        weigh: Returns a value's weight; None counts values.
        at_least: How many of the most recent stay regardless of weight.

    Attributes:
        held: Total weight of the values.
    """

    def __init__(self, budget: int, weigh: Callable[[V], int] | None = None, *, at_least: int = 0) -> None:
        self.budget, self.at_least = budget, at_least
        self.held = 0
        self._weigh = weigh or (lambda value: 1)
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def get(self, key: K) -> V | None:
        """The value, which counts as used now; None if it is not held."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: K, value: V) -> None:
        """Hold a value, and drop others for it; one that is too heavy is not held."""
        weight = self._weigh(value)
        if weight > self.budget and self.at_least == 0:
            return
        if key in self._values:
            self.held -= self._weigh(self._values.pop(key))
        self._values[key] = value
        self.held += weight
        while self.held > self.budget and len(self._values) > self.at_least:
            self.held -= self._weigh(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()
        self.held = 0
