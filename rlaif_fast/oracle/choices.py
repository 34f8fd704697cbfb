"""Which option a reply picks, as a careful reader would see it; none if in doubt.

A reply is read in four steps:

1. `_final_part` keeps what counts as the answer: the last `<answer>` block, what follows the reasoning, the last
   `\\boxed{}`. It drops markup, a quoted list of the options, and what was taken back ("wait, no: C").
2. A reply that is nothing but a label, or nothing but an option's text, picks that option.
3. Otherwise every label in the text is read within its clause: does an answering phrase lead to it ("the answer is"),
   is it at the head or alone ("B, because", "it is B"), is it negated ("not A", "A is wrong")? Labels that are
   joined ("B or C") are treated alike. The strongest kind of pick counts, if all of that kind agree.
4. If no label is picked or mentioned, the one option whose text is in the reply is picked.

The words are in `choice_words`. A capital letter before a word is an article or a name ("A red ball", "Vitamin C"),
not a label, unless the words around it say so.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rlaif_fast.data.schema import index_of_letter, option_letters
from rlaif_fast.oracle import choice_words as words
from rlaif_fast.oracle.choice_texts import (
    begins_with,
    contained_option,
    ends_with,
    names_another,
    same_text,
    skip_text,
)
from rlaif_fast.oracle.extract import MARKUP, final_part

_MOST_LABELS = 200  # a reply with more picks nothing, and would take long to read
_NUMBER = re.compile(r"\W*[-+]?\d+(?:[.,]\d+)?\W*")


@dataclass(frozen=True)
class _Mention:
    """A label in the text: its option, its place, and whether it is written like a label ("(B)", "B.")."""

    index: int
    start: int
    end: int
    marked: bool


def parse_choice(response: str, options: Sequence[str]) -> int | None:
    """The index of the option that a reply picks.

    Args:
        response: The reply.
        options: The option texts, "A" first; may be empty if only letters (A to Z) were asked for.

    Returns:
        The index, or None if no option or more than one is picked, or in doubt.
    """
    count = len(options) or len(string.ascii_uppercase)
    text = _final_part(response, options, count)
    if text is None:
        return None
    by_letter, by_text = _bare_label(text, count), same_text(text, options)
    if by_letter is not None and by_text is not None:
        return by_letter if by_letter == by_text else None
    if by_letter is not None or by_text is not None:
        return by_text if by_letter is None else by_letter
    if _NUMBER.fullmatch(text):
        return None  # an index counts from 0 or from 1
    return _by_sentences(text, options, count)


def reference_choice(reference: str, options: Sequence[str]) -> int | None:
    """The index of the option that a reference answer names; None if it names none.

    Rows give the letter, so a letter is the option's label, even if it is another option's text.
    """
    label = _bare_label(reference.strip(), len(options))
    return parse_choice(reference, options) if label is None else label


def _final_part(response: str, options: Sequence[str], count: int) -> str | None:
    """The part of the reply that is the answer, without markup; None if it has none."""
    text = final_part(unicodedata.normalize("NFKC", response))
    if text is None:
        return None
    text = MARKUP.sub("", text).strip()
    text = "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())
    return _without_list(text, options, count)


def _without_list(text: str, options: Sequence[str], count: int) -> str:
    """`text` without the options, if the reply quotes two or more of them with their labels, "A" first."""
    at, found = 0, 0
    begin = None
    for letter, option in zip(option_letters(count), options):
        pattern = rf"[(\[]?{letter}[.):\]]+\s*{re.escape(' '.join(option.split()))}[.;,]?(?!\w)"
        match = re.compile(pattern, re.IGNORECASE).search(text, at)
        if match is None or (found and text[at : match.start()].strip(" \n;,|/-")):
            break
        begin, at, found = (match.start() if begin is None else begin), match.end(), found + 1
    if found < 2 or begin is None:
        return text
    return f"{text[:begin].rstrip()}\n{text[at:].lstrip()}".strip("\n")


def _bare_label(text: str, count: int) -> int | None:
    """The label of a reply that is a label and nothing else ("B", "(b).", "Option B", "選択肢 B")."""
    match = re.fullmatch(rf"\W*(?:{words.LABEL_NOUN}\W*)?([A-Za-z]{{1,2}})\W*", text, re.IGNORECASE)
    return None if match is None else index_of_letter(match.group(1), count)


def _by_sentences(text: str, options: Sequence[str], count: int) -> int | None:
    """Read every label within its clause; if there is none, look for every option's text."""
    if len(_mentions(text, count)) > _MOST_LABELS:
        return None
    revised = words.REVISION.split(text)
    if len(revised) > 1:
        picked, mentioned = _by_labels(revised[-1], options, count)
        if mentioned:
            return picked  # what was said before was taken back
    picked, mentioned = _by_labels(text, options, count)
    if mentioned:
        return picked
    rejected = {index for index, strength in _judged(text, options, count) if strength == words.REJECTED}
    if len(revised) > 1 and (last := contained_option(revised[-1], options, rejected)) is not None:
        return last
    return contained_option(text, options, rejected)


def _by_labels(text: str, options: Sequence[str], count: int) -> tuple[int | None, bool]:
    """The option that the labels of `text` pick, and whether it holds a label that is not merely rejected."""
    judged = _judged(text, options, count)
    rejected = {index for index, strength in judged if strength == words.REJECTED}
    alive = [(index, strength) for index, strength in judged if strength >= words.NONE]
    strongest = max((strength for _, strength in alive), default=words.NONE)
    if strongest <= words.HEDGED:
        return None, bool(alive)
    picked = {index for index, strength in alive if strength == strongest}
    # A hedge casts doubt on every pick; any other label only on a pick that no answering phrase leads to.
    doubts = (words.HEDGED, words.MAYBE)
    rivals = {i for i, s in alive if s in doubts or strongest < words.VERDICT} | picked
    if len(rivals) != 1 or picked & rejected:
        return None, True
    (index,) = rivals
    named = [mention for mention in _mentions(text, count) if mention.index == index]
    contradicted = any(names_another(text[mention.end :], index, options) for mention in named)
    return (None if contradicted else index), True


def _judged(text: str, options: Sequence[str], count: int) -> list[tuple[int, int]]:
    """Every label of `text` as (option, strength by the words around it)."""
    return [
        (mention.index, strength)
        for group in _groups(text, _mentions(text, count))
        for strength in [_strength(text, group, options)]
        for mention in group
    ]


def _mentions(text: str, count: int) -> list[_Mention]:
    """Every token of `text` that could be a label."""
    found = []
    for match in words.LABEL.finditer(text):
        letter = match.group("upper") or match.group("lower")
        index = index_of_letter(letter, count)
        if index is not None and not words.is_article(match.group(), text[match.end() : match.end() + 40]):
            marked = bool(match.group("open") or match.group("close"))
            found.append(_Mention(index, match.start(), match.end(), marked))
    return found


def _groups(text: str, mentions: Sequence[_Mention]) -> list[list[_Mention]]:
    """Mentions grouped if only commas, "or" and "and" separate them."""
    groups: list[list[_Mention]] = []
    for mention in mentions:
        if groups and words.JOINED.fullmatch(text[groups[-1][-1].end : mention.start]):
            groups[-1].append(mention)
        else:
            groups.append([mention])
    return groups


def _strength(text: str, group: Sequence[_Mention], options: Sequence[str]) -> int:
    """The strength of a group of labels by the words around it; one of the constants of `choice_words`."""
    start, end = group[0].start, group[-1].end
    first, last = (options[at.index] if options else "" for at in (group[0], group[-1]))
    head = words.last_clause(text[:start])
    tail, mark = words.first_clause(text[end:])
    led = words.CUE.search(head) is not None
    rest = skip_text(tail, last)
    before, after = words.NEGATED_HEAD.search(head), words.NEGATED_TAIL.match(rest)
    if mark == "?" and words.DENIED.match(text[end + len(tail) :].partition("?")[2]):
        return words.REJECTED
    if before or after:
        return words.HEDGED if before and after else words.REJECTED
    if len(group) == 1 and not group[0].marked and words.is_word(text[start:end], head, tail, led=led):
        return words.WORD
    if words.CONDITION.search(head) or (mark == "?" and words.ASKING.match(head)):
        return words.NONE
    if led:
        return words.FINAL if words.FINAL_CUE.search(head) else words.ANSWER
    if words.HEDGED_TAIL.match(tail):
        return words.HEDGED
    if words.VERDICT_TAIL.match(rest):
        return words.VERDICT
    if words.MAYBE_HEAD.search(head):
        return words.MAYBE
    begins = not words.LABEL_LEAD.sub("", head).strip(" \"'“”‘’«»「」-–—•:")
    stops = group[-1].marked or words.HEAD_TAIL.match(tail) or begins_with(text[end:], last)
    begins = begins or ends_with(head, first)
    return words.HEAD if stops and (begins or words.FILLED.fullmatch(head)) else words.NONE
