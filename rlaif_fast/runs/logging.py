"""A run's output while it works: metrics, event files, rollouts, timings and the progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from rlaif_fast.errors import RlaifFastError, needed_by, typed_line
from rlaif_fast.runs.events import EventFiles
from rlaif_fast.runs.files import json_line, plain, read_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.trackers import Trackers

with needed_by("this command", "train"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

# What the progress line shows, in this order: the scalar, its label, its format.
LIVE_VALUES = (
    ("loss", "loss", ".3g"),
    ("accuracy", "accuracy", ".3f"),
    ("held-out", "held-out", ".3f"),
    ("kl", "KL", ".4f"),
    ("kendall_tau", "agreement", "+.2f"),
)
PLAIN_SHARE = 0.1  # share of a stage between two plain lines
PLAIN_SECONDS = 15.0  # or this many seconds


class RunLogger:
    """Writes a run's records and shows its progress. Use it as a context manager.

    `metrics.jsonl` is the source: TensorBoard event files are derived from it, and rewritten from it when a run is
    resumed.

    Args:
        run_dir: Where to write.
        tensorboard: Whether to write event files.
        log_every: Record every `log_every` steps; the last step of a stage, a blind control of the oracle and
            evaluations are always recorded.
        stream: Where progress goes, standard output by default: a bar on a terminal, plain lines elsewhere.
        seconds: Timings to continue from, as returned by `seconds()` before the run was interrupted.
        report_to: Trackers that also get the metrics (`runs.trackers`).
        config: The run's configuration, for the trackers.

    Attributes:
        records: Steps and evaluations recorded so far in this process, including the one being written.

    Raises:
        UsageError: `tensorboard` is set and the package is not installed.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        tensorboard: bool = True,
        log_every: int = 1,
        stream: TextIO | None = None,
        seconds: Mapping[str, float] | None = None,
        report_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"log_every: expected at least 1, got {log_every}")
        self.records = 0
        self._log_every = log_every
        self._seconds = dict(seconds or {})
        self._timers: list[str] = []
        self._timer_mark = 0.0
        self._console = _RunConsole(
            file=stream if stream is not None else sys.stdout, markup=False, highlight=False, soft_wrap=True
        )
        self._stages: list[_Stage] = []
        self._live: dict[str, float] = {}

        self._run_dir = run_dir
        earlier = list(read_jsonl(run_dir.metrics))
        self._has_begun = bool(earlier)
        self._started = time.perf_counter() - (earlier[-1]["time"] if earlier else 0.0)
        self._events = EventFiles(run_dir, self.message) if tensorboard else None
        self._trackers = Trackers(list(report_to), run_dir, config or {}, self.message)
        for record in earlier:
            if self._events is not None:
                self._events.write(record)
            self._trackers.replay(record)
        # Unbuffered: every line is handed to the system at once, so a full disk shows up there and not at the end.
        self._metrics = run_dir.metrics.open("ab", buffering=0)
        self._rollouts = run_dir.rollouts.open("ab", buffering=0)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Flush and close every file; trackers are told what ended the run, if something did."""
        self._metrics.close()
        self._rollouts.close()
        if self._events is not None:
            self._events.close()
        self._trackers.finish(None if error is None else typed_line(error))

    @contextlib.contextmanager
    def stage(self, name: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
        """Show the progress of `total` steps, of which `start` are done; `log(name, step, ...)` advances it.

        A stage inside another one, such as an evaluation, is shown below it while it lasts.

        Yields:
            A function that sets the number of steps done, for a stage that logs nothing at each step.
        """
        outer = self._stages[-1] if self._stages else None
        progress = outer.progress if outer else _progress_bar(self._console)
        if progress is not None and outer is None:
            progress.start()
        stage = _Stage(name, total, start, self._console, progress, nested=outer is not None)
        self._stages.append(stage)
        try:
            yield lambda done: stage.update(done, self._live_text())
        finally:
            self._stages.pop()
            stage.close()
            if progress is not None and outer is None:
                progress.stop()

    def log(self, stage: str, step: int, **scalars: Any) -> None:
        """Record scalars of a step; tensors are read, which waits for the device, only when recorded.

        The first call marks the run as begun: an earlier run that it replaces is deleted.

        Args:
            stage: "sft", "rl" or "eval".
            step: Steps done in the stage, including this one; for an evaluation, in the stage that its phase names.
            scalars: Numbers, 0-d tensors, or what an evaluation reports (`phase`, `split`, `accuracy`,
                `by_category`).

        Raises:
            RlaifFastError: The disk is full or fails.
        """
        if not self._has_begun:
            self._run_dir.let_go()
            self._has_begun = True
        running = next((entry for entry in self._stages if entry.name == stage and stage != "eval"), None)
        last = running is not None and step >= running.total
        controlled = any(name.startswith("oracle/blind_") for name in scalars)
        if stage == "eval" or last or controlled or step % self._log_every == 0:
            record = plain({"time": round(self.elapsed(), 3), "stage": stage, "step": step, **scalars})
            self.records += 1
            _append(self._metrics, json_line(record))
            if self._events is not None:
                self._events.write(record)
            self._trackers.log(record)
            if stage == "eval":
                self.message(_evaluation_line(record))
                self._show("held-out", record.get("accuracy"))
            else:
                for key, *_ in LIVE_VALUES:
                    self._show(key, record.get(key))
        if running is not None:
            running.update(step, self._live_text())

    def rollouts(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Record the groups of an RL step.

        Raises:
            RlaifFastError: The disk is full or fails.
        """
        _append(self._rollouts, "".join(json_line(record) for record in records))

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of a block to `name`; an inner timer's time is taken off the outer one."""
        self._charge()
        self._timers.append(name)
        try:
            yield
        finally:
            self._charge()
            self._timers.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by timer name; they do not overlap, so their sum is at most the run's wall-clock time."""
        self._charge()
        return dict(self._seconds)

    def message(self, text: str) -> None:
        """Print a plain line, above the bar if there is one."""
        self._console.print(text)

    def elapsed(self) -> float:
        """Seconds of work so far, including those before a resume but not the pause."""
        return time.perf_counter() - self._started

    def _charge(self) -> None:
        """Give the time since the last mark to the innermost timer."""
        now = time.perf_counter()
        if self._timers:
            name = self._timers[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._timer_mark
        self._timer_mark = now

    def _show(self, key: str, value: float | None) -> None:
        if value is not None:
            self._live[key] = value

    def _live_text(self) -> str:
        return "  ".join(
            f"{label} {self._live[key]:{spec}}" for key, label, spec in LIVE_VALUES if key in self._live
        )


class PackageLog(logging.Handler):
    """Shows log messages of the package's own modules as lines of a run: what was chosen for this machine, and why.

    A context manager. Only the run's first process uses one, so a choice that all make is shown once.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show
        self._package = logging.getLogger("rlaif_fast")

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())

    def __enter__(self) -> PackageLog:
        self._before = self._package.level
        self._package.setLevel(min(logging.INFO, self._before or logging.INFO))
        self._package.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._package.removeHandler(self)
        self._package.setLevel(self._before)


class SilentLogger:
    """Replaces `RunLogger` in processes of a run that neither write nor print."""

    records = 0

    def __enter__(self) -> SilentLogger:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, name: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def log(self, stage: str, step: int, **scalars: Any) -> None:
        pass

    def rollouts(self, records: Sequence[Mapping[str, Any]]) -> None:
        pass

    def timer(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def seconds(self) -> dict[str, float]:
        return {}

    def message(self, text: str) -> None:
        pass

    def elapsed(self) -> float:
        return 0.0


class _RunConsole(Console):
    """Ends the run as SIGTERM does if nothing reads its output any more; rich would end it within a step."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()
        try:
            print("nothing reads what the run prints any more (broken pipe)", file=sys.stderr, flush=True)
        except OSError:  # the same pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        signal.raise_signal(signal.SIGTERM)


class _Stage:
    """The progress of one stage: a task of the bar, or plain lines without a bar."""

    def __init__(
        self, name: str, total: int, start: int, console: Console, progress: Progress | None, *, nested: bool
    ) -> None:
        self.name = name
        self.total = total
        self.progress = progress
        self._start = start
        self._console = console
        self._nested = nested
        self._started = self._printed_at = time.perf_counter()
        self._printed = start
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(name, total=total, completed=start, live="")

    def update(self, done: int, live: str) -> None:
        if self.progress is not None and self._task is not None:
            self.progress.update(self._task, completed=done, live=live)
            return
        now = time.perf_counter()
        due = done - self._printed >= PLAIN_SHARE * self.total or done >= self.total
        if (due and not self._nested and done > self._printed) or now - self._printed_at >= PLAIN_SECONDS:
            pace = (now - self._started) / max(done - self._start, 1)
            eta = f"ETA {_duration(pace * (self.total - done))}" if done < self.total else "done"
            steps = f"{done:>{len(str(self.total))}}/{self.total}"
            share = done / max(self.total, 1)
            self._console.print(f"{self.name} {steps} {share:4.0%} {eta}  {live}".rstrip())
            self._printed, self._printed_at = done, now

    def close(self) -> None:
        if self.progress is not None and self._task is not None and self._nested:
            self.progress.remove_task(self._task)


def _progress_bar(console: Console) -> Progress | None:
    """A bar if the console is a terminal."""
    if not console.is_terminal:
        return None
    return Progress(
        TextColumn("{task.description:<5}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[live]}"),
        console=console,
        refresh_per_second=4,
    )


def _append(file: FileIO, text: str) -> None:
    data = text.encode()
    if os.name == "posix" and os.fstat(file.fileno()).st_nlink == 0:
        raise RlaifFastError(f"{file.name} was removed while the run went on; the run ends")
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        path = Path(str(file.name))
        raise RlaifFastError(
            f"cannot write {path} ({error.strerror}); free space, then continue with --resume {path.parent}"
        ) from error


def _evaluation_line(record: Mapping[str, Any]) -> str:
    counts = [row["n"] for row in record.get("by_category", {}).values()]
    of = f" of {sum(counts)} answers" if counts else ""
    accuracy, win_rate = record.get("accuracy"), record.get("win_rate")
    shown = [f"accuracy {accuracy:.3f}{of}"] if accuracy is not None else []
    shown += [f"win rate against the start {win_rate:.3f}"] if win_rate is not None else []
    where = f"{record.get('phase', '')} step {record['step']}, {record.get('split', '')}"
    return f"eval {where}: {', '.join(shown) or 'accuracy unknown'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
