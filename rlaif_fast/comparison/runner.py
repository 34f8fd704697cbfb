"""Runs the jobs of a comparison as separate processes, several at a time; finished jobs are not run again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rlaif_fast.cli import parse_config
from rlaif_fast.comparison.plan import Job
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.outputs import INDEX, write_atomically
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.yaml_keys import dump, load

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0  # for a stopped run to save
# options that `--resume` may change and a result depends on
RESUMABLE = ("max_steps", "learning_rate", "sft_learning_rate", "dtype")
PLACES = ("output_dir", "sft", "cache_dir")  # keys that say where something is, not what it is


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int


@dataclass
class Progress:
    """Progress of a comparison.

    Attributes:
        total: Runs in all.
        done: Runs that finished, now or earlier.
        failed: Folders of runs that failed, with the last line each of them printed.
        running: Folders of the runs in progress.
    """

    total: int
    done: int = 0
    failed: dict[Path, str] = field(default_factory=dict)
    running: tuple[Path, ...] = ()


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    environment: Callable[[int], dict[str, str]] = lambda slot: {},
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Run what is not finished yet; an interrupted run resumes from its last checkpoint.

    Args:
        jobs: The runs, starts before the runs that follow them.
        workers: Most runs at a time.
        environment: Variables for the run in a slot (0 to workers - 1), such as the GPU that it may use.
        show: Called after every change.

    Returns:
        The progress at the end. A failed run does not stop the others, but runs that build on it are skipped.
    """
    waiting = [job for job in jobs if not RunDir(job.folder).finished]
    progress = Progress(total=len(jobs), done=len(jobs) - len(waiting))
    running: list[_Running] = []
    with _stopping(running):
        while waiting or running:
            running[:] = [entry for entry in running if not _ended(entry, progress)]
            _start_ready(waiting, running, progress, workers, environment)
            progress.running = tuple(entry.job.folder for entry in running)
            show(progress)
            if running:
                time.sleep(POLL_SECONDS)
    return progress


def _start_ready(
    waiting: list[Job],
    running: list[_Running],
    progress: Progress,
    workers: int,
    environment: Callable[[int], dict[str, str]],
) -> None:
    for job in list(waiting):
        if job.after in progress.failed:
            waiting.remove(job)
            progress.failed[job.folder] = f"its start {job.after} failed"
        elif len(running) < workers and (job.after is None or RunDir(job.after).finished):
            waiting.remove(job)
            slot = next(n for n in range(workers) if n not in {entry.slot for entry in running})
            running.append(_Running(job, _launch(job, environment(slot)), slot))


def refuse_changed(jobs: Sequence[Job]) -> None:
    """Check that every existing run was made with the values that the comparison now asks for.

    Raises:
        UsageError: A run was made with other or unknown values; the first is named, with its keys.
    """
    for job in jobs:
        if not (RunDir(job.folder).finished or _has_checkpoint(job)):
            continue
        way_out = "choose another output_dir, or remove that folder"
        try:
            made = load(_config_file(job).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"config: {_config_file(job)}, which says how {job.folder} was made, is missing; {way_out}"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError):
            made = None
        if not isinstance(made, dict):
            raise UsageError(
                f"config: {_config_file(job)}, which says how {job.folder} was made, is damaged; {way_out}"
            )
        now = load(dump(job.values, sort_keys=True))
        changes = [
            f"{key} {made.get(key, 'unset')!r} (now {now.get(key, 'unset')!r})"
            for key in sorted((made.keys() | now.keys()) - set(PLACES))
            if made.get(key, "unset") != now.get(key, "unset")
        ]
        changes += _resumed_with(job)
        if changes:
            raise UsageError(f"config: {job.folder} was made with {', '.join(changes)}; {way_out}")


def _resumed_with(job: Job) -> list[str]:
    """Settings that a command changed when it resumed the run on its own, such as a raised `max_steps`."""
    from rlaif_fast.trainer.cached_model import defaults_of
    from rlaif_fast.trainer.options import TrainConfig

    try:
        found = yaml.safe_load(RunDir(job.folder).read_config() or "")
    except (yaml.YAMLError, ValueError):
        return []  # resuming the run will report it
    if not isinstance(found, dict):
        return []
    model = job.values.get("model", TrainConfig.model)
    under = defaults_of(model, lambda line: None)
    words = ["--config", str(_config_file(job))]
    asked = parse_config(TrainConfig, words, prog="rlaif_fast.train", description="", under=under)
    return [
        f"{key} {found[key]!r} (now {getattr(asked, key)!r})"
        for key in RESUMABLE
        if key in found and found[key] != getattr(asked, key)
    ]


def _config_file(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.yaml")


def _has_checkpoint(job: Job) -> bool:
    return (job.folder / "checkpoints" / INDEX).exists()


def _launch(job: Job, variables: dict[str, str]) -> subprocess.Popen:
    """Start or resume one run; its output goes to `NAME.log` beside its folder."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    config = _config_file(job)
    log = job.folder.with_name(f"{job.folder.name}.log")
    write_atomically(config, dump(job.values, sort_keys=True))
    words = ["--config", str(config)]
    if _has_checkpoint(job):
        words = ["--resume", str(job.folder)]
    elif job.folder.exists():
        words += ["--overwrite_output_dir", "true"]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "rlaif_fast.train", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            start_new_session=True,
        )


def _ended(entry: _Running, progress: Progress) -> bool:
    """Whether a run has ended; records how."""
    code = entry.process.poll()
    if code is None:
        return False
    if code == 0 and RunDir(entry.job.folder).finished:
        progress.done += 1
    else:
        progress.failed[entry.job.folder] = f"exit code {code}: {_last_line(entry.job.folder)}"
    return True


def _last_line(folder: Path) -> str:
    log = folder.with_name(f"{folder.name}.log")
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it printed nothing"


@contextlib.contextmanager
def _stopping(running: list[_Running]) -> Iterator[None]:
    """Stop the running jobs when the comparison is stopped; they can be resumed."""
    try:
        yield
    finally:
        for entry in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(entry.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for entry in running:
            try:
                entry.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(entry.process.pid, signal.SIGKILL)
                entry.process.wait()


def check_all_finished(progress: Progress) -> None:
    """Raise `RlaifFastError` if any run failed, naming each with its reason."""
    if progress.failed:
        lines = "; ".join(f"{folder}: {reason}" for folder, reason in progress.failed.items())
        raise RlaifFastError(f"{len(progress.failed)} of {progress.total} runs failed: {lines}")
