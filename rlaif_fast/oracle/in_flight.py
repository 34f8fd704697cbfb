"""Questions in progress: what is asked twice at the same time, by threads or in one batch, is answered once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class InFlight(Generic[T]):
    """Who is at work on which key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[str, Future[T]] = {}

    def __reduce__(self) -> tuple[type[InFlight[T]], tuple[()]]:
        return InFlight, ()  # a copy has nothing in progress

    def run(self, keys: Sequence[str], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Return what belongs to each key. Others are waited for only after the own work is done, so none block.

        Args:
            keys: What is asked for; repeats allowed.
            work: Given the places of the keys that nobody is at work on, returns one value for each. What it raises,
                all raise who wait for one of them.
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
