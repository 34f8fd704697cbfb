"""Brings the options and answer of a row into one form: texts without labels, and the letter of the right one."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rlaif_fast.data.errors import RowError
from rlaif_fast.data.schema import index_of_letter, option_letters

_LABEL = re.compile(r"^\s*(?:\(([A-Z]{1,2})\)|([A-Z]{1,2})[.):])\s*(.*\S)\s*$", re.DOTALL)
_LETTER = re.compile(r"^\s*(?:\(([A-Z]{1,2})\)|([A-Z]{1,2}))(?:[.):]\s*|\s*$|(?<=\))\s+)(.*)$", re.DOTALL)
_ANSWER = re.compile(r"<answer>([^<]*(?:<(?!/answer>)[^<]*)*)</answer>", re.IGNORECASE)
_CLOSES = re.compile(r"</think>", re.IGNORECASE)
MAX_OPTIONS = 702  # A to ZZ


def split_target(answer: str | None, scored: str) -> tuple[str | None, str | None]:
    """The part of an answer that is scored, and the whole answer if that is more.

    Args:
        answer: The answer, perhaps with `<think>...</think><answer>...</answer>` around it.
        scored: "answer" scores only the last `<answer>` block, "whole" all of it.
    """
    if answer is None or not answer.strip():
        return None, None
    whole = answer.strip()
    if scored == "whole":
        return whole, None
    behind = _CLOSES.split(whole)[-1].strip() or whole
    blocks = _ANSWER.findall(behind)  # not those that the reasoning mentions
    if blocks:
        return blocks[-1].strip() or None, whole
    return behind, whole if behind != whole else None


def settle_options(question: str, answer: str | None, options: Any) -> tuple[str, list[str], str | None]:
    """The question, the options without labels, and the answer's letter if there are options.

    Raises:
        RowError: The options are not valid, or the answer is not one of them.
    """
    if not options:
        return _from_question(question, answer)
    if not isinstance(options, list):
        raise RowError(f"options: expected a list of texts, got {options!r:.60}")
    texts = [
        str(option) if isinstance(option, (int, float)) and not isinstance(option, bool) else option
        for option in options
    ]
    if not all(isinstance(option, str) and option.strip() for option in texts):
        raise RowError(f"options: expected a list of texts, got {options!r:.60}")
    if not 2 <= len(texts) <= MAX_OPTIONS:
        raise RowError(f"options: expected at least 2 and at most {MAX_OPTIONS}, got {len(texts)}")
    found = unlabelled(texts)
    if answer is None:
        return question, found, None
    letter = letter_of(answer, found, labelled=found != [text.strip() for text in texts])
    if letter is None:
        if [_plain(text) for text in found].count(_plain(answer)) > 1:
            raise RowError(f"answer: {answer!r:.60} is the text of several options; give its letter")
        raise RowError(
            f"answer: {answer!r:.60} is none of the options, or labels another than stands there; give its letter"
        )
    return question, found, letter


def _from_question(question: str, answer: str | None) -> tuple[str, list[str], str | None]:
    """Options written into the question, one per line; the text after them stays in the question."""
    lines = question.splitlines()
    first = next((i for i, line in enumerate(lines) if label_of(line) == "A"), None)
    if not first or answer is None:
        return question, [], answer
    found: list[str] = []
    letters = option_letters(len(lines))
    for line in lines[first:]:
        if label_of(line) != letters[len(found)]:
            break
        found.append(line)
    inside = unlabelled(found)
    letter = letter_of(answer, inside, labelled=True)
    if len(inside) < 2 or letter is None:
        return question, [], answer
    rest = [line for line in lines[first + len(found) :] if line.strip()]
    return "\n".join([*lines[:first], *rest]).strip(), inside, letter


def contradict(answer: str, solution: str, options: Any) -> bool:
    """Whether a row's answer and its solution certainly name different things.

    A solution that is neither an `<answer>` block nor an option may be a derivation, and contradicts nothing.
    """
    block = _ANSWER.search(solution) is not None
    first, second = (split_target(text, "answer")[0] or "" for text in (answer, solution))
    if isinstance(options, list) and all(isinstance(option, str) for option in options):
        texts = unlabelled(options)
        if not block and _plain(second) not in map(_plain, [*option_letters(len(texts)), *texts, *options]):
            return False
        letters = [
            letter_of(text, texts, labelled=texts != [option.strip() for option in options])
            for text in (first, second)
        ]
        return None not in letters and letters[0] != letters[1]
    here, there = _plain(first), _plain(second)
    return block and here not in there and there not in here


def label_of(option: str) -> str | None:
    """The label before an option's text."""
    match = _LABEL.match(option)
    return (match.group(1) or match.group(2)) if match else None


def unlabelled(options: list[str]) -> list[str]:
    """The options without "A. ", "(B) ", "C) ", if all of them carry such labels, in order."""
    if [label_of(option) for option in options] != option_letters(len(options)):
        return [option.strip() for option in options]
    return [match.group(3) for option in options if (match := _LABEL.match(option))]


def letter_of(answer: str, options: list[str], *, labelled: bool = False) -> str | None:
    """The letter an answer names: "B", "(B)", "B. the text", "(B) the text" or "the text".

    If the options are letters themselves, "B" is the label if the row `labelled` them, else the text.
    """
    letters = option_letters(len(options))
    texts = [_plain(option) for option in options]
    if not (labelled and answer.strip() in letters) and texts.count(_plain(answer)) == 1:
        return letters[texts.index(_plain(answer))]
    match = _LETTER.match(answer)
    index = index_of_letter(match.group(1) or match.group(2), len(options)) if match else None
    if match is None or index is None:
        return None
    text = _plain(match.group(3))
    if text in texts and texts[index] != text:
        return None  # the letter of one option, the text of another
    if not labelled and letters[index] in set(map(label_of, options)) - {label_of(options[index])}:
        return None  # a row that shuffles its labelled options means their own labels
    return letters[index]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold().rstrip(" .")
