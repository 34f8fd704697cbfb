"""Responses are data: how they are shown to a judge, and under which names.

A policy that is trained against a judge exploits whatever the judge's prompt lets through. So a response is
stripped of control sequences, capped, and written as one JSON string in which no character can end the
surrounding block; its label is drawn anew for every order it is shown in, from a hash that the response
cannot know.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Sequence

_TERMINAL_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROL_TOKEN = re.compile(r"<\|[^<>]{0,64}\|>|\[/?INST\]|</?s>|<</?SYS>>")
# control, invisible format (bidi, zero width), unpaired, private, unassigned
_DROPPED = {"Cc", "Cf", "Cs", "Co", "Cn"}
_CUT = " …[cut]… "
_LABEL_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: no label is a word
_LABEL_DIGITS = "23456789"


class Shown(str):
    """A response as a judge is shown it.

    Attributes:
        answer: The answer inside it, if the judge was told how to find one; else None.
    """

    answer: str | None = None


def show_responses(
    responses: Sequence[str], max_chars: int, extract: re.Pattern[str] | None = None
) -> tuple[list[Shown], list[int]]:
    """The distinct responses as they are shown, and each response's index among them.

    Responses are distinguished by their whole text. If cutting would make two of them look the same, more of them
    is kept.

    Args:
        responses: The responses.
        max_chars: Length each is cut to, in the middle.
        extract: Its first group is the answer inside a response.
    """
    place: dict[str, int] = {}
    places = [place.setdefault(text, len(place)) for text in map(clean_text, responses)]
    whole = list(place)
    cap = max_chars
    while len({cut_middle(text, cap) for text in whole}) < len(whole):
        cap *= 2
    shown = [Shown(cut_middle(text, cap)) for text in whole]
    if extract is not None:
        for text, response in zip(reversed(places), reversed(responses)):
            found = extract.search(response)
            shown[text].answer = (
                None if found is None else cut_middle(clean_text(found.group(1) or ""), max_chars)
            )
    return shown, places


def cut_middle(text: str, max_chars: int) -> str:
    """`text`; if it is longer than `max_chars`, its first third and its end, where a conclusion would be."""
    if len(text) <= max_chars:
        return text
    head = max_chars // 3
    return text[:head] + _CUT + text[len(text) - (max_chars - head) :]


def clean_text(text: str) -> str:
    """One line of plain text without terminal escapes, control tokens and invisible characters."""
    text = unicodedata.normalize("NFC", _TERMINAL_SEQUENCE.sub(" ", text))
    text = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or unicodedata.category(character) not in _DROPPED
    )
    # Removing one control token can join the halves of another, so repeat until nothing changes.
    while (stripped := _CONTROL_TOKEN.sub(" ", text)) != text:
        text = stripped
    return " ".join(text.split())


def quote(value: object) -> str:
    """JSON on one line that cannot contain a tag, bracketed control token or Unicode line break."""
    encoded = json.dumps(value, ensure_ascii=False)
    for character in "<>&\u0085\u2028\u2029":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return encoded


def draw_labels(count: int, *content: str) -> tuple[str, ...]:
    """Distinct labels such as "K7Q" for `count` responses, fixed by a hash of `content`."""
    generator = seeded_generator(*content)
    labels: list[str] = []
    while len(labels) < count:
        first, digit, last = (generator.choice(s) for s in (_LABEL_LETTERS, _LABEL_DIGITS, _LABEL_LETTERS))
        label = first + digit + last
        if label not in labels:
            labels.append(label)
    return tuple(labels)


def draw_orders(size: int, count: int, *content: str) -> list[tuple[int, ...]]:
    """`count` orders of appearance: shuffles, each followed by its own reverse.

    A judge that goes only by the slot then contradicts itself exactly: every pair is shown equally often both
    ways.
    """
    generator = seeded_generator("orders", *content)
    orders: list[tuple[int, ...]] = []
    while len(orders) < count:
        order = tuple(generator.sample(range(size), size))
        orders += [order, order[::-1]]
    return orders[:count]


def seeded_generator(*content: str) -> random.Random:
    """A random generator fixed by a hash of `content`."""
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))
