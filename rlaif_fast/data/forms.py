"""Whether a `metadata.form` is a regular expression that matches in bounded time."""

from __future__ import annotations

import re
from typing import Any

from rlaif_fast.data.errors import RowError

try:
    from re import _constants as _codes  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _codes
    import sre_parse as _parser

MAX_FORM_CHARS = 4000
MAX_TEXT_CHARS = 4000  # of a text that is matched; a longer one is malformed
_MANY = 20  # repeats from here on count as without bound
_MOST_REPEATS = (
    2  # of anything, one behind the other: their number is the power of the time that matching takes
)


def check_form(form: Any, answer: str | None) -> None:
    """Refuse a `form` that is none, may take very long, or does not match the row's own answer.

    Raises:
        RowError: With the reason.
    """
    reason = fault_of(form)
    if reason is not None:
        raise RowError(f"metadata.form: {reason}")
    squeezed = " ".join((answer or "").split())
    pattern = re.compile(form, re.IGNORECASE)
    if answer is not None and not any(
        map(pattern.fullmatch, (squeezed, squeezed.rstrip(" .!?,;:"), f"{squeezed}."))
    ):
        raise RowError(f"metadata.form: the answer {answer!r:.60} does not match it")


def fault_of(form: Any) -> str | None:
    """Why a `form` cannot be used; None where it can."""
    if not isinstance(form, str):
        return f"expected a regular expression, got {type(form).__name__}"
    if len(form) > MAX_FORM_CHARS:
        return f"longer than {MAX_FORM_CHARS} characters"
    try:
        tree = _parser.parse(form, re.IGNORECASE)
        re.compile(form, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return f"not a regular expression ({error})"
    wide, problem = _walk(tree, inside=False)
    if problem is None and wide > _MOST_REPEATS:
        problem = f"{wide} repeats of almost anything, at most {_MOST_REPEATS} are matched in bounded time"
    return problem


def _walk(tree: Any, inside: bool) -> tuple[int, str | None]:
    """How many unbounded repeats of a wide class there are, and what may take exponential time."""
    wide = 0
    for code, argument in tree:
        if code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            _, most, body = argument
            many = most is _codes.MAXREPEAT or most >= _MANY
            single = len(body) == 1 and body[0][0] in _SINGLE
            if many and inside:
                return wide, "a repeat inside a repeat may take forever"
            if many and not single:
                return wide, "a repeat of a group may take forever; write it out"
            wide += many and _is_wide(body[0])
            if not single:
                count, problem = _walk(body, inside or most > 1)
                wide += count
                if problem:
                    return wide, problem
        elif code is _codes.BRANCH:
            counts = [_walk(branch, inside) for branch in argument[1]]
            wide += max((count for count, _ in counts), default=0)
            if found := next((problem for _, problem in counts if problem), None):
                return wide, found
        elif code in (_codes.GROUPREF, _codes.GROUPREF_EXISTS):
            return wide, "references to groups may take very long"
        else:
            for part in argument if isinstance(argument, tuple) else ():
                if isinstance(part, _parser.SubPattern):
                    count, problem = _walk(part, inside)
                    wide += count
                    if problem:
                        return wide, problem
    return wide, None


_SINGLE = (_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN, _codes.CATEGORY)


def _is_wide(item: Any) -> bool:
    """Whether one item matches spaces as well as letters, so that repeats of it overlap across words."""
    code, argument = item
    if code in (_codes.ANY, _codes.NOT_LITERAL):
        return True
    if code is not _codes.IN:
        return False
    return argument[0][0] is _codes.NEGATE or (
        any(
            part == (_codes.CATEGORY, _codes.CATEGORY_SPACE) or part == (_codes.LITERAL, 32)
            for part in argument
        )
    )
