"""Finds the text of an option in a reply; the rules that use it are in `choices`."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

from rlaif_fast.data.forms import FINAL_PUNCTUATION
from rlaif_fast.oracle import choice_words as words

QUOTES = "\"'“”‘’«»「」"
_WORD = re.compile(r"[^\W_]+")


def same_text(text: str, options: Sequence[str]) -> int | None:
    """The one option whose text is the whole reply, ignoring quotes, case and final punctuation."""
    same = [i for i, option in enumerate(options) if plain(option) and plain(option) == plain(text)]
    return same[0] if len(same) == 1 else None


def plain(text: str) -> str:
    """`text` case-folded, without surrounding quotes and final punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(QUOTES).rstrip(FINAL_PUNCTUATION)


def skip_text(tail: str, option: str) -> str:
    """`tail` without the option's text, if it begins with it."""
    option = " ".join(option.split())
    rest = tail.lstrip(" .:)-–—,")
    return rest[len(option) :] if option and rest.casefold().startswith(option.casefold()) else tail


def begins_with(text: str, option: str) -> bool:
    """Whether `text` begins with the words of an option."""
    wanted = tokens(option)
    return bool(wanted) and tokens(text)[: len(wanted)] == wanted


def ends_with(text: str, option: str) -> bool:
    """Whether `text` ends with the words of an option, ignoring a noun like "option" after them."""
    wanted = tokens(option)
    return bool(wanted) and tokens(words.LABEL_LEAD.sub("", text.rstrip("( [")))[-len(wanted) :] == wanted


def names_another(tail: str, index: int, options: Sequence[str]) -> bool:
    """Whether what follows the label of option `index` is the text of another ("B. a dog" where A is "a dog")."""
    after = tokens(words.first_clause(tail.lstrip(" .:)-–—,"))[0])
    named = [i for i, option in enumerate(options) if tokens(option) and tokens(option) == after]
    return bool(named) and index not in named


def contained_option(text: str, options: Sequence[str], rejected: set[int]) -> int | None:
    """The one option whose text is in the reply, not negated and not inside a longer option's text."""
    found = tokens(text)
    spans = [
        (start, start + len(wanted), index)
        for index, wanted in enumerate(map(tokens, options))
        if wanted
        for start in range(len(found) - len(wanted) + 1)
        if found[start : start + len(wanted)] == wanted
    ]
    kept: set[int] = set()
    reach, longest = 0, (0, 0)
    for start, end, index in sorted(spans, key=lambda span: (span[0], -span[1])):
        inside = end <= reach and (start, end) != longest
        if end > reach:
            reach, longest = end, (start, end)
        if inside or _negated(found, start) or _only_a_word(found, start, end):
            continue
        if not _is_a_place(found, start, end):
            kept.add(index)
    if len(kept) != 1 or kept & rejected:
        return None
    return kept.pop()


def _negated(found: Sequence[str], start: int) -> bool:
    """Whether a negation comes within three words before an option's text that does not itself begin with one."""
    before = found[max(0, start - 3) : start]
    if words.SMALL_WORD.fullmatch(found[start]) and before and before[-1] in words.JOINS:
        return False  # "no, but yes" says both
    return not words.NEGATION.fullmatch(found[start]) and any(map(words.NEGATION.fullmatch, before))


def _only_a_word(found: Sequence[str], start: int, end: int) -> bool:
    """Whether an option such as "no" is in the middle of a sentence ("I have no idea")."""
    if end - start > 1 or not words.SMALL_WORD.fullmatch(found[start]) or start == 0:
        return False
    return (
        found[start - 1] not in ("and", "or", "but")
        and words.CUE.search(" ".join(found[:start]) + " ") is None
    )


def _is_a_place(found: Sequence[str], start: int, end: int) -> bool:
    """Whether an option such as "3" may be another option's number ("option 3"), counted from 0 or from 1."""
    return (
        end - start == 1
        and start > 0
        and found[start].isdecimal()
        and words.PLACE_NOUN.fullmatch(found[start - 1]) is not None
    )


@functools.lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[str, ...]:
    """The words and numbers of `text`, case-folded, in order."""
    return tuple(_WORD.findall(plain(text)))
