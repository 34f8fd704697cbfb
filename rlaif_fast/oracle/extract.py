"""The option `extract`: how the answer is found inside a longer response."""

from __future__ import annotations

import functools
import re

from rlaif_fast.errors import UsageError


@functools.cache
def compile_extract(extract: str | None) -> re.Pattern[str] | None:
    """Compile an `extract`; None stays None.

    Raises:
        UsageError: If it is no regular expression, or captures nothing.
    """
    if not extract:
        return None
    try:
        pattern = re.compile(extract, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"oracle option 'extract' is not a regular expression ({error})") from error
    if pattern.groups < 1:
        raise UsageError("oracle option 'extract' needs one group that captures the answer")
    return pattern
