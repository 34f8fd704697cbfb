"""Errors that a user can act on: commands print them as one line and exit with `exit_code`."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

# What to do when the system refuses something, by `OSError.errno`.
HINTS = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some space",
    errno.EFBIG: "; raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "; raise the limit of open files (ulimit -n)",
    errno.ENFILE: "; raise the limit of open files of the machine",
}


class RlaifFastError(Exception):
    """A failure with a message that says what happened and what to do. Commands exit with 1."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(RlaifFastError):
    """The command, the configuration or the input data is wrong. Commands exit with 2."""

    exit_code = 2


class MissingPackage(RlaifFastError, ImportError):
    """A required package is not installed; the message says which extra provides it."""


class Outage(RlaifFastError):
    """A judge, an engine or the media files failed for good; the run's work so far is intact and can be saved."""


def nearest(name: str, known: Iterable[str], otherwise: str = ".") -> str:
    """The end of a message about an unknown name: the nearest known name, or `otherwise`."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def printable(text: str) -> str:
    """`text` with control characters and unpaired surrogates escaped, so that no file name can write to a terminal.

    Line breaks stay, since messages may have several lines.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in _UNPRINTED
        else _escape(character)
        for character in text
    )


_UNPRINTED = {"Cc", "Cf", "Cs"}  # control, invisible format (bidi), surrogates


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file or folder being written if the system refuses it.

    Raises:
        RlaifFastError: The system refused, be it by an OSError or by a library's own error.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise RlaifFastError(f"cannot write {path}: {reason}") from error


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Say what to install if the block imports a missing package.

    Args:
        what: Who needs it, the subject of the message: "the api oracle".
        extra: The extra of rlaif-fast that provides it.

    Raises:
        MissingPackage: An import failed.
    """
    try:
        yield
    except ImportError as error:
        raise missing(what, error, extra) from error


def missing(what: str, error: ImportError, extra: str) -> MissingPackage:
    """The error that `needed_by` raises in place of `error`."""
    package = error.name or "a package"
    return MissingPackage(
        f"{what} needs {package}, which is not installed; run: pip install 'rlaif-fast[{extra}]'"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def typed_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, if there is one."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def refusal(error: Exception) -> str | None:
    """Why the system refused to write, and what to do; None for an error of another kind.

    Only Python itself raises OSError. safetensors and tokenizers quote the system in their own errors, and torch.save
    reports only its position in the file.
    """
    if isinstance(error, OSError):
        return f"{error.strerror or error}{HINTS.get(error.errno or 0, '')}"
    if quoted := re.search(r"\(os error (\d+)\)", str(error)):
        return f"{error}{HINTS.get(int(quoted.group(1)), '')}"
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return f"a file was not written to its end{HINTS[errno.ENOSPC]}"
    return None


def require(ok: bool, name: str, expected: str, got: Any) -> None:
    """Raise `UsageError` that names an option, what it expects and what it got, unless `ok`."""
    if not ok:
        raise UsageError(f"{name}: expected {expected}, got {got!r}")


def require_positive(name: str, value: float | None) -> None:
    """Raise `UsageError` unless an option is None or a finite number above 0."""
    ok = value is None or (math.isfinite(value) and value > 0)
    require(ok, name, "a positive number", value)


def require_least(name: str, value: float | None, minimum: int) -> None:
    """Raise `UsageError` unless an option is None or a finite number of at least `minimum`."""
    ok = value is None or (math.isfinite(value) and value >= minimum)
    require(ok, name, f"{minimum} or more", value)


def check_fields(options: Any, prefix: str = "") -> None:
    """Raise `UsageError` if a field of an option class, or of one nested in it, is None against its type, or a whole
    number of more than 64 bits.

    A YAML file can say `KEY: null` for any key.
    """
    hints = get_type_hints(type(options))
    for option in dataclasses.fields(options):
        value, hint = getattr(options, option.name), hints[option.name]
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{option.name}.")
        elif value is None and hint is not Any and NoneType not in (hint, *get_args(hint)):
            raise UsageError(
                f"{prefix}{option.name}: expected a value, got null; leave it out for the default"
            )
        elif isinstance(value, int):
            require(abs(value) < 2**63, f"{prefix}{option.name}", "a number of 64 bits", value)
