"""SIGTERM: the first asks a run to finish its step, save and end; a second one, or the end of the grace, ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(BaseException):
    """The run was asked to end and has saved what it had, or had nothing to save. Commands exit with 143."""


class Termination:
    """Whether this process was asked to end.

    Args:
        grace_seconds: How long the step and the checkpoint may take before the process ends without them.
        announce: Say on stderr that the request was heard; one process of a run does.
    """

    def __init__(self, grace_seconds: float, *, announce: bool = True) -> None:
        self.grace_seconds = grace_seconds
        self.announce = announce
        self.requested = False
        self._saves = False
        self._timer: threading.Timer | None = None

    @contextmanager
    def installed(self) -> Iterator[Termination]:
        """Listen while the block runs; elsewhere than in the main thread, nothing can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._timer is not None:
                self._timer.cancel()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A block that looks at `requested` after each step and saves; outside of it, a request ends at once."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            os._exit(EXIT_CODE)
        self.requested = True
        if not self._saves:
            raise Terminated
        self._timer = threading.Timer(self.grace_seconds, os._exit, (EXIT_CODE,))
        self._timer.daemon = True
        self._timer.start()
        if self.announce:
            print("SIGTERM: this step is finished and saved, then the run ends", file=sys.stderr, flush=True)
