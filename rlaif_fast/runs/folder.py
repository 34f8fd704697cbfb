"""The run directory: what a run leaves behind, and the rules that keep it honest.

A folder is ours if it holds the marker file; it is a finished run if it also holds `summary.json`, which is written
last and atomically. The `.jsonl` files only grow, one object per line, so a killed run loses at most the line being
written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlaif_fast.digests import file_digest, text_digest
from rlaif_fast.errors import UsageError
from rlaif_fast.outputs import INDEX, LOCK, MARKER, MOVING, RECORDS, REPLACED, write_atomically, written_as
from rlaif_fast.runs.files import plain
from rlaif_fast.runs.summary import unfit

if os.name == "posix":
    import fcntl

MIN_FREE_BYTES = 256 * 2**20


class RunDir:
    """One run's folder and the paths in it. Make it with `create` or `open`.

    Attributes:
        path: The folder.
        config: The resolved configuration, YAML.
        metrics: Scalars by stage and step, one object per line.
        rollouts: The groups RL learned from, one object per line.
        samples: Responses to the test clips of the gallery before and after RL, one object per line.
        quarantine: Media that could not be read, and why, one object per line.
        summary: The result; its presence means that the run finished.
        report: The self-contained HTML report.
        figures: The report's figures as PNG.
        checkpoints: Weights and trainer state.
        tensorboard: Event files, derived from `metrics`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    def predictions(self, phase: str) -> Path:
        """The file of the test predictions made after `phase`."""
        return self.path / f"predictions-{phase}.jsonl"

    @property
    def created(self) -> float:
        """When the run began, in seconds since the epoch."""
        return float(self._marker()["created"])

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return self.summary.is_file()

    @classmethod
    def create(
        cls, path: str | Path, *, overwrite: bool = False, min_free_bytes: int = MIN_FREE_BYTES
    ) -> RunDir:
        """Make an empty run folder.

        Args:
            path: The folder; missing parents are made.
            overwrite: Start over in a folder that already holds a run, which `let_go` deletes and `restore` puts
                back. Files that a run does not write stay.
            min_free_bytes: Refuse a disk with less free space.

        Raises:
            UsageError: `path` is a file, a folder that is not ours, a run that would be lost or is still in progress,
                not writable, not UTF-8, or on a disk that is too full.
        """
        run = cls(path)
        try:
            str(run.path).encode()
        except UnicodeEncodeError:  # tokenizers and TensorBoard cannot write to such a path
            raise UsageError(
                f"output_dir {str(run.path)!a} is not a name in UTF-8; choose another folder"
            ) from None
        try:
            if run.path.exists() and not run.path.is_dir():
                raise UsageError(
                    f"output_dir {run.path} is a file; choose a folder that is empty or does not exist"
                )
            entries = {entry.name for entry in run.path.iterdir()} if run.path.exists() else set()
            if MARKER not in entries and any(written_as(name) != MARKER for name in entries - {LOCK}):
                raise UsageError(
                    f"output_dir {run.path} is not empty and was not made by a run; choose another folder"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            with run.lock():
                run.restore()
                earlier = run._check_replaceable(overwrite)
                free = shutil.disk_usage(run.path).free
                if free < min_free_bytes:
                    raise UsageError(
                        f"output_dir {run.path} has {_size(free)} of disk space left and the run needs at least "
                        f"{_size(min_free_bytes)}; free some or choose another disk"
                    )
                if earlier:
                    run._set_aside()
                run._clear()
                write_atomically(
                    run.path / MARKER, json.dumps({"format": 1, "created": round(time.time())}) + "\n"
                )
                run.checkpoints.mkdir()
        except OSError as error:
            raise UsageError(
                f"output_dir {run.path} cannot be written ({error.strerror}); choose another folder"
            ) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run folder, to resume it or to report on it.

        Raises:
            UsageError: There is no such run.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise UsageError(f"there is no run folder {run.path}; give the --output_dir of an earlier run")
        if not (run.path / MARKER).is_file():
            raise UsageError(f"{run.path} was not made by a run; give the --output_dir of an earlier run")
        return run

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder during the block; the lock ends with its process.

        A file system without locks keeps nobody out. With locks nobody else is writing now, so temporary files of a
        killed process are removed.

        Raises:
            UsageError: Another run has the lock.
        """
        with (self.path / LOCK).open("a") as file:
            try:
                if os.name == "posix":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"output_dir {self.path} is in use by a run that still goes on; wait for it to end, "
                    "or choose another folder"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            else:
                if os.name == "posix":
                    self._sweep()
            yield

    def _sweep(self) -> None:
        for entry in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            if any(fnmatch(written_as(entry.name), record) for record in (*RECORDS, INDEX)):
                entry.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json` completely or not at all. Call it last.

        It has digests of the records that its figures come from, and of itself.
        """
        digests = {path.name: file_digest(path) for path in self._results if path.is_file()}
        whole = {**summary, **({"sha256": digests} if digests else {})}
        write_atomically(self.summary, self._sealed(plain(whole)))

    def _sealed(self, summary: Mapping[str, Any]) -> str:
        """The text of a summary with a digest of itself, besides those of the records."""

        def text(values: Mapping[str, Any]) -> str:
            return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

        own = {self.summary.name: text_digest(text(summary))}
        return text({**summary, "sha256": {**summary.get("sha256", {}), **own}})

    def read_summary(self) -> dict[str, Any]:
        """Return the summary of a finished run.

        Raises:
            UsageError: The run has not finished, or its summary has changed since.
        """
        if not self.finished:
            raise UsageError(
                f"{self.path} has no summary.json: the run did not finish; continue it with --resume"
            )
        try:
            text = self.summary.read_bytes().decode()
            summary = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self.summary} is not valid JSON ({error})") from error
        if not isinstance(summary, dict):
            raise UsageError(f"{self.summary} holds {type(summary).__name__}, expected an object")
        if name := unfit(summary):
            raise UsageError(
                f"{self.summary}: {name} is not what this version writes; bring the file back, or run again"
            )
        digests = summary.pop("sha256", {})
        own = digests.pop(self.summary.name, None)
        if digests:
            summary["sha256"] = digests
        if own is not None and text != self._sealed(summary):
            raise self._changed(self.summary)
        return summary

    def read_config(self) -> str | None:
        """The text of config.yaml on disk; None if there is none or it cannot be read."""
        try:
            return self.config.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def began_with(self, kind: str, found: Mapping[str, str], *, keep: bool = True) -> dict[str, str]:
        """What a kind of input was when the run began; if that is unknown, `found`.

        Args:
            kind: The kind.
            found: What it is now, by name.
            keep: Record `found` if nothing is known, so that later calls compare with it.

        Raises:
            UsageError: The marker is damaged.
        """
        values = self._marker()
        known: dict[str, str] = values.get(kind, dict(found))
        if keep and kind not in values:
            write_atomically(self.path / MARKER, json.dumps({**values, kind: known}) + "\n")
        return known

    def _marker(self) -> dict[str, Any]:
        try:
            values = dict(json.loads((self.path / MARKER).read_bytes()))
            float(values["created"])
        except (TypeError, ValueError, KeyError):
            raise UsageError(f"{self.path / MARKER} is damaged; bring it back, or begin a new run") from None
        return values

    def refuse_damaged_results(self, summary: Mapping[str, Any]) -> None:
        """Check that metrics and predictions have not changed since the run finished.

        Args:
            summary: Its summary; one of an earlier version has no digests to check.

        Raises:
            UsageError: A file is missing or has changed.
        """
        for path in self._results:
            digest = summary.get("sha256", {}).get(path.name)
            if digest is not None and not (path.is_file() and file_digest(path) == digest):
                raise self._changed(path)

    def _changed(self, path: Path) -> UsageError:
        return UsageError(
            f"{path} is not as the run wrote it; bring it back, or remove {self.path} and run again"
        )

    @property
    def _results(self) -> list[Path]:
        return [self.metrics, self.predictions("sft"), self.predictions("final")]

    @property
    def records(self) -> list[Path]:
        """The files whose state at each checkpoint is recorded; all but the predictions only grow."""
        return [self.metrics, self.rollouts, self.samples, self.quarantine, self.predictions("sft")]

    def truncate_to(self, lengths: Mapping[str, int]) -> dict[Path, tuple[int, bytes]]:
        """Drop the old report and all records after a checkpoint, so that a resumed run counts nothing twice.

        Args:
            lengths: Bytes to keep of each of `records`, by file name; files not named are removed.

        Returns:
            For a finished run, what was dropped, for `put_back`: for each file, where it began, and the bytes.
        """
        was_finished = self.finished
        figures = sorted(self.figures.glob("*")) if self.figures.is_dir() else []
        starts = dict.fromkeys((self.summary, self.predictions("final"), self.report, *figures), 0)
        starts |= {path: lengths.get(path.name, 0) for path in self.records}
        dropped = {}
        for path, start in starts.items():
            if not path.is_file() or path.stat().st_size <= start > 0:
                continue
            if was_finished:
                with path.open("rb") as file:
                    file.seek(start)
                    dropped[path] = start, file.read()
            if start == 0:
                path.unlink()
            else:
                os.truncate(path, start)
        shutil.rmtree(self.figures, ignore_errors=True)
        return dropped

    def put_back(self, dropped: dict[Path, tuple[int, bytes]]) -> None:
        """Undo `truncate_to`; the summary comes last, since half a run must not look finished."""
        for path, (start, data) in reversed(dropped.items()):
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.truncate(start)
                file.write(data)

    def let_go(self) -> None:
        """Delete the run that this one replaces; leftovers after a kill are deleted with the next."""
        replaced = self.path / REPLACED
        if replaced.is_dir():
            (replaced / MARKER).unlink(missing_ok=True)  # `restore` ignores it without this
            shutil.rmtree(replaced)

    def restore(self) -> bool:
        """Put back the run that this one was to replace; returns whether there was one."""
        replaced, moving = self.path / REPLACED, self.path / MOVING
        if (replaced / MARKER).is_file():
            self._clear()
            replaced.rename(moving)
        if not moving.is_dir():
            return False
        for entry in sorted(moving.iterdir()):
            entry.rename(self.path / entry.name)
        moving.rmdir()
        return True

    def _check_replaceable(self, overwrite: bool) -> bool:
        """Whether there is a run that would be lost; losing it needs `overwrite`."""
        if self.finished and not overwrite:
            raise UsageError(
                f"output_dir {self.path} holds a finished run; choose another folder, "
                "or set overwrite_output_dir to replace it"
            )
        entries = sorted(entry.name for entry in self.checkpoints.glob("*"))
        begun = bool(entries)
        if begun and not overwrite:
            raise UsageError(
                f"output_dir {self.path} holds an unfinished run; continue it with --resume {self.path}, "
                "or set overwrite_output_dir to start over"
            )
        for name in entries:
            if INDEX not in (name, written_as(name)) and not is_checkpoint_name(name, partial=True):
                raise UsageError(
                    f"overwrite_output_dir: {self.checkpoints / name} was not written by a run and would be deleted; "
                    "move it elsewhere"
                )
        return self.finished or begun

    def _set_aside(self) -> None:
        shutil.rmtree(self.path / REPLACED, ignore_errors=True)
        moving = self.path / MOVING
        moving.mkdir()
        for entry in self._written():
            entry.rename(moving / entry.name)
        shutil.copy2(self.path / MARKER, moving / MARKER)
        moving.rename(self.path / REPLACED)

    def _written(self) -> list[Path]:
        """What a run has written, the summary first, since half a run must not look finished."""
        files = (self.summary, self.config, self.metrics, self.rollouts, self.samples, self.quarantine)
        folders = (self.checkpoints, self.tensorboard, self.figures)
        predictions = self.path.glob("predictions-*.jsonl")
        return [entry for entry in (*files, self.report, *predictions, *folders) if entry.exists()]

    def _clear(self) -> None:
        for entry in self._written():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def is_checkpoint_name(name: str, *, partial: bool = False) -> bool:
    """Whether runs give checkpoints such a name (end or step of a stage); with `partial`, also one in the making."""
    whole = name.removeprefix(".").removesuffix(".partial") if partial else name
    return re.fullmatch(r"sft|(sft|rl)-\d+", whole) is not None


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
