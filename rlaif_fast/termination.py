"""SIGTERM: the first asks a run to finish its step, save and end; a second one, or the end of the grace, ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
ECHO_SECONDS = 5.0  # torchrun passes a signal on at once, on a busy machine perhaps seconds later


class Terminated(BaseException):
    """The run was asked to end and has saved what it had, or had nothing to save. Commands exit with 143."""


class Termination:
    """Whether this process was asked to end.

    Args:
        grace_seconds: How long the step and the checkpoint may take before the process ends without them.
        announce: Say on stderr that the request was heard; one process of a run does.
        echo_seconds: Another signal that comes so soon is the same request. Schedulers send it to all processes of a
            job, and torchrun passes on to its processes what it got itself.
    """

    def __init__(self, grace_seconds: float, *, announce: bool = True, echo_seconds: float = 0.0) -> None:
        self.grace_seconds = grace_seconds
        self.announce = announce
        self.echo_seconds = echo_seconds
        self._heard_at = 0.0  # of the monotonic clock
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
        now = time.monotonic()
        if self.requested and now - self._heard_at >= self.echo_seconds:
            os._exit(EXIT_CODE)
        if self.requested:
            return
        self.requested, self._heard_at = True, now
        if not self._saves:
            raise Terminated
        self._timer = threading.Timer(self.grace_seconds, os._exit, (EXIT_CODE,))
        self._timer.daemon = True
        self._timer.start()
        if self.announce:
            print("SIGTERM: this step is finished and saved, then the run ends", file=sys.stderr, flush=True)
