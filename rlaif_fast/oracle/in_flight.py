"""Questions in progress: a question asked twice at once, by threads or in one batch, is answered only once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class InFlight(Generic[T]):
    """Keys being worked on, with their pending answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[str, Future[T]] = {}

    def __reduce__(self) -> tuple[type[InFlight[T]], tuple[()]]:
        return InFlight, ()  # a copy has nothing in progress

    def run(self, keys: Sequence[str], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Return the value of each key. A caller waits for others only after doing its own work, so none deadlock.

        Args:
            keys: The keys wanted; repeats allowed.
            work: Given the places of the keys that nobody is working on, returns one value for each. Whatever it
                raises is also raised in every caller that waits for one of them.
        """
        own: dict[str, int] = {}
        try:
            with self._lock:
                for place, key in enumerate(keys):
                    if key not in self._answers:
                        own[key] = place
                        self._answers[key] = Future()
                answers = [self._answers[key] for key in keys]
            values = work(list(own.values())) if own else ()
            for key, value in zip(own, values, strict=True):
                self._answers[key].set_result(value)
        except BaseException as error:
            for key in own:
                if not self._answers[key].done():
                    self._answers[key].set_exception(error)
            raise
        finally:
            with self._lock:
                for key in own:
                    del self._answers[key]
        return [answer.result() for answer in answers]
