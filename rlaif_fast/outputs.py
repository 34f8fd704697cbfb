"""Output files: anything that would lose data is refused before any work is done, and no file is left half-written."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError

MARKER = ".rlaif-fast-run"  # in the folder of a run
LOCK = ".lock"
REPLACED = ".replaced"  # an earlier run, until the one that replaces it has begun
MOVING = ".moving"  # the same while it is moved there or back
INDEX = "index.json"  # in the folder of a run's checkpoints
# What a run writes into its folder, as patterns.
RECORDS = (
    *("config.yaml", "metrics.jsonl", "rollouts.jsonl", "samples.jsonl", "quarantine.jsonl", "summary.json"),
    *("predictions-*.jsonl", "report.html", "figures", "checkpoints", "tensorboard"),
    *(MARKER, LOCK, REPLACED, MOVING),
)


def check_output(name: str, path: str | Path, reads: Iterable[str | Path | None] = ()) -> Path:
    """Return the file that an option names, after checking that it can be written and that nothing is lost by it.

    Args:
        name: The option.
        path: The file; an earlier one is replaced.
        reads: Files that the command reads.

    Raises:
        UsageError: Its folder is missing or read-only; or it is a folder, one of `reads`, or a record of a run.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise UsageError(f"{name}: the folder {path.parent} does not exist; make it, or give another file")
    if path.is_dir():
        raise UsageError(f"{name}: {path} is a folder; give a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{name}: the folder {path.parent} is not writable; give another file")
    for read in reads if path.exists() else ():
        if read is not None and is_same(path, Path(read).expanduser()):
            raise UsageError(f"{name}: {path} is read, and would be lost; give another file")
    refuse_records(name, path)
    return path


def refuse_records(name: str, path: Path) -> None:
    """Raise `UsageError` if an option names a file that a run has written, or a path in it."""
    whole = path.resolve()
    for folder in whole.parents:
        first = whole.relative_to(folder).parts[0]
        if (folder / MARKER).is_file() and any(fnmatch(first, record) for record in RECORDS):
            raise UsageError(f"{name}: {path} belongs to the run in {folder}; choose another place")


def is_same(first: Path, second: Path) -> bool:
    """Whether two paths are one file."""
    try:
        return first.resolve() == second.resolve() or first.samefile(second)
    except (OSError, RuntimeError):  # one does not exist; a loop of links
        return False


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(path))
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # errors of a full disk name no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the rename itself must survive a power cut


def save_figure(figure: Any, path: Path, *, dpi: float) -> None:
    """Write a figure of Matplotlib atomically, in the format of the file's suffix.

    Raises:
        ValueError: Matplotlib has no such format.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or "png", dpi=dpi)
    write_atomically(path, picture.getvalue())


def sync(path: Path) -> None:
    """Have the system flush a file, or the names in a folder, to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def written_as(name: str) -> str:
    """The final name of a file with this temporary name of `write_atomically`; "" for other files."""
    found = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return found[1] if found else ""
