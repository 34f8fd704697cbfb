"""Finds the answer inside a longer response: by the option `extract`, or by the usual marks of reasoning."""

from __future__ import annotations

import functools
import re

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.choice_texts import plain

MARKUP = re.compile(r"\*\*|__|[*`_~#>]|\$|\\\(|\\\)|\\\[|\\\]|<\|[^<>|]{0,40}\|>|</?s>")
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_CLOSES = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_UNFINISHED = re.compile(r"^\s*<think(?:ing)?>", re.IGNORECASE)
_BOXED = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{([^{}]*)\}|\s(\w))|"
    r"<\|begin_of_box\|>([^|]*)<\|end_of_box\|>"  # GLM-V's
)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|rm|bf)\s*\{([^{}]*)\}")


def final_part(response: str) -> str | None:
    """The answer that a reply gives after its reasoning; None if it gives none, or two different ones.

    That is its last `<answer>` block, else what follows `</think>`, else all of it; within that, what is `\\boxed`. A
    block inside the reasoning counts only if nothing follows the reasoning. Two blocks or boxes that differ are no
    answer, nor is reasoning that never ends.
    """
    text = response
    behind = _CLOSES.split(text, 1)[-1]
    answers = _ANSWER.findall(behind if behind.strip() else text)
    if len({plain(MARKUP.sub("", answer)) for answer in answers}) > 1:
        return None
    if answers:
        text = answers[-1]
    elif "</think" in text.casefold():
        text = _THOUGHT.sub("", text)
    elif _UNFINISHED.match(text):
        return None
    text = _LATEX_TEXT.sub(r"\1", text)
    boxed = ["".join(forms) for forms in _BOXED.findall(text)]
    if len(set(map(plain, boxed))) > 1:
        return None
    return boxed[-1] if boxed else text


@functools.cache
def compile_extract(extract: str | None) -> re.Pattern[str] | None:
    """Compile an `extract`; None stays None.

    Raises:
        UsageError: If it is not a regular expression, or captures nothing.
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
