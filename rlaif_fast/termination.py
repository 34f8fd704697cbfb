"""SIGTERM and SIGHUP: the first asks a run to finish its step, save and end; a second, or the end of grace, ends it.

A step that has used half of the grace is given up, so that the finished ones can still be saved. SIGHUP comes when the
terminal closes; if it is ignored (nohup), it stays ignored.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
ECHO_SECONDS = 5.0  # torchrun forwards a signal at once, or seconds later on a busy machine


class Terminated(BaseException):
    """The run was told to end and has saved what it had, or had nothing to save. Commands exit with 143.

    Its message is the name of the signal.
    """


class StepGivenUp(Terminated):
    """The step took too long. The steps finished before it are saved."""


def end_with_parent(code: int) -> None:
    """In a process that `multiprocessing` started: end at once, with this exit code, when the parent process ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(code)

    threading.Thread(target=watch, daemon=True).start()


class Termination:
    """Whether this process was told to end.

    Args:
        grace_seconds: How long the step and the checkpoint may take before the process ends without them. The step
            may take half of it.
        announce: Say on stderr that the request was heard; only one process of a run does.
        echo_seconds: Another signal within this time is the same request. Schedulers send it to all processes of a job,
            and torchrun forwards what it got to its processes.
    """

    def __init__(self, grace_seconds: float, *, announce: bool = True, echo_seconds: float = 0.0) -> None:
        self.grace_seconds = grace_seconds
        self.announce = announce
        self.echo_seconds = echo_seconds
        self._heard_at = 0.0  # by the monotonic clock
        self.requested = False
        self.heard = "SIGTERM"  # the signal, in a process that got one
        self._may_give_up: Callable[[], bool] | None = None
        self._half_over = False
        self._timers: list[threading.Timer] = []

    @contextmanager
    def installed(self) -> Iterator[Termination]:
        """Listen during the block; this works only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        listened = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in listened}
        try:
            yield self
        finally:
            for timer in self._timers:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def saving(self, may_give_up: Callable[[], bool]) -> Iterator[None]:
        """A block that checks `requested` after each step and saves; outside it, a request ends the process at once.

        Args:
            may_give_up: Called when a step in the block has used half of the grace. If it returns true, `StepGivenUp`
                breaks the step; if not, the step gets the other half too.
        """
        self._may_give_up = may_give_up
        try:
            yield
        finally:
            self._may_give_up = None

    def _on_signal(self, number: int, _: object) -> None:
        if self._half_over:
            self._half_over = False
            if self._may_give_up is not None and self._may_give_up():
                raise StepGivenUp(self.heard)
            return
        now, self.heard = time.monotonic(), signal.Signals(number).name
        if self.heard == "SIGHUP":
            self._leave_terminals()
        if self.requested and now - self._heard_at >= self.echo_seconds:
            os._exit(EXIT_CODE)
        if self.requested:
            return
        self.requested, self._heard_at = True, now
        if self._may_give_up is None:
            raise Terminated(self.heard)
        for seconds, act, arguments in (
            (self.grace_seconds / 2, self._wake, (number,)),
            (self.grace_seconds, os._exit, (EXIT_CODE,)),
        ):
            timer = threading.Timer(seconds, act, arguments)
            timer.daemon = True
            timer.start()
            self._timers.append(timer)
        if self.announce:
            print(
                f"{self.heard}: the run saves and ends when this step is done, or without it in"
                f" {self.grace_seconds / 2:g} s",
                file=sys.stderr,
                flush=True,
            )

    def _wake(self, number: int) -> None:
        """Make the main thread notice that half of the grace is over, even if it is waiting in a system call."""
        self._half_over = True
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, number)

    def _leave_terminals(self) -> None:
        """Redirect what would go to a closed terminal, where writing fails, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in self._terminals:
            os.dup2(nowhere, fd)
        os.close(nowhere)
