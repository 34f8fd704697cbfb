"""Checks that a `metadata.form` is a regular expression that matches in bounded time."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rlaif_fast.data.errors import RowError

try:
    from re import _constants as _codes  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _codes
    import sre_parse as _parser

MAX_FORM_CHARS = 4000
MAX_TEXT_CHARS = 4000  # of a matched text; a longer one is malformed
FINAL_PUNCTUATION = " \t\n.!?,;:。、।۔؟؛،"  # NFKC turns full-width signs into the first of these
_MANY = 20  # this many repeats or more count as unbounded
# repeats of anything in a row: matching time grows with the text's length to the power of their number
_MOST_REPEATS = 2


def check_form(form: Any, answer: str | None) -> None:
    """Refuse a `form` that is invalid, may take very long, or does not match the row's own answer.

    Raises:
        RowError: With the reason.
    """
    reason = fault_of(form)
    if reason is not None:
        raise RowError(f"metadata.form: {reason}")
    if answer is not None and match_form(re.compile(form, re.IGNORECASE), answer) is None:
        raise RowError(f"metadata.form: the answer {answer!r:.60} does not match it")


def match_form(form: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The match of a text, as it is or without its final punctuation; None if it is malformed."""
    squeezed = " ".join(unicodedata.normalize("NFKC", text).split())
    if len(squeezed) > MAX_TEXT_CHARS:
        return None
    return form.fullmatch(squeezed) or form.fullmatch(squeezed.rstrip(FINAL_PUNCTUATION))


def fault_of(form: Any) -> str | None:
    """Why a `form` cannot be used; None if it can."""
    if not isinstance(form, str):
        return f"expected a regular expression, got {type(form).__name__}"
    if len(form) > MAX_FORM_CHARS:
        return f"longer than {MAX_FORM_CHARS} characters"
    try:
        tree = _parser.parse(form, re.IGNORECASE)
        re.compile(form, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return f"not a regular expression ({error})"
    try:
        wide = _wide_repeats(tree, inside=False)
    except _Unbounded as fault:
        return str(fault)
    if wide > _MOST_REPEATS:
        return f"{wide} repeats of almost anything, at most {_MOST_REPEATS} are matched in bounded time"
    return None


class _Unbounded(Exception):
    """Matching may take exponential time; the message says why."""


def _wide_repeats(tree: Any, inside: bool) -> int:
    """How many unbounded repeats of a wide class there are.

    Raises:
        _Unbounded: Matching may take exponential time.
    """
    wide = 0
    for code, argument in tree:
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            _, most, body = argument
            many = most is _codes.MAXREPEAT or most >= _MANY
            single = len(body) == 1 and body[0][0] in _SINGLE
            if many and inside:
                raise _Unbounded("a repeat inside a repeat may take forever")
            if many and not single:
                raise _Unbounded("a repeat of a group may take forever; write it out")
            wide += many and _is_wide(body[0])
            if not single:
                wide += _wide_repeats(body, inside or most > 1)
        elif code is _codes.BRANCH:
            wide += max((_wide_repeats(branch, inside) for branch in argument[1]), default=0)
        elif code in (_codes.GROUPREF, _codes.GROUPREF_EXISTS):
            raise _Unbounded("references to groups may take very long")
        elif isinstance(argument, tuple):
            parts = (part for part in argument if isinstance(part, _parser.SubPattern))
            wide += sum(_wide_repeats(part, inside) for part in parts)
    return wide


_SINGLE = (_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN, _codes.CATEGORY)


def _is_wide(item: Any) -> bool:
    """Whether one item matches spaces as well as letters, so that repeats of it overlap across words."""
    code, argument = item
    if code in (_codes.ANY, _codes.NOT_LITERAL):
        return True
    if code is not _codes.IN:
        return False
    spaces = (_codes.CATEGORY, _codes.CATEGORY_SPACE), (_codes.LITERAL, 32)
    return argument[0][0] is _codes.NEGATE or any(part in spaces for part in argument)
