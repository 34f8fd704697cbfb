"""The dataset row: what is asked about which media. One JSON object per line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlaif_fast.video.refs import MediaRef

T = TypeVar("T")

NO_CATEGORY = "all"  # the category of rows that name none
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def option_letters(count: int) -> list[str]:
    """The labels of `count` options: A to Z, then AA, AB and so on."""
    return [_letter(index) for index in range(count)]


def lettered(options: Sequence[str], form: str = "{}. {}") -> list[str]:
    """The options with their labels, joined by `form`."""
    return [form.format(letter, text) for letter, text in zip(option_letters(len(options)), options)]


def named_categories(by_category: Mapping[str, T]) -> Mapping[str, T]:
    """The categories to show beside the total. The total is called "all", so rows that name none are "(none)" there.

    Empty if no row names one, since the total then says it all.
    """
    if by_category.keys() <= {NO_CATEGORY}:
        return {}
    return {"(none)" if name == NO_CATEGORY else name: value for name, value in by_category.items()}


def _letter(index: int) -> str:
    higher, own = divmod(index, len(_ALPHABET))
    return (_letter(higher - 1) if higher else "") + _ALPHABET[own]


def index_of_letter(letter: str, count: int) -> int | None:
    """The index of a label, in either case, among `count` options; None if it is not one of theirs."""
    index = 0
    for character in letter.upper():
        if character not in _ALPHABET:
            return None
        index = index * len(_ALPHABET) + _ALPHABET.index(character) + 1
    return index - 1 if 0 < index <= count else None


@dataclass(frozen=True)
class Example:
    """One question about one or more videos or images.

    Attributes:
        id: Unique within its file.
        question: The question, without the options.
        answer: The reference answer; None if there is none. For multiple choice the letter, "A" first.
        videos: Paths, resolved against the folder of the dataset file.
        images: Paths, resolved likewise.
        options: The choices of a multiple-choice question, without letters; empty for open questions.
        category: What accuracy is reported by.
        metadata: Whatever else the row carries.
        system: System prompt, if the row gives one.
        source: "file:line", for messages.
        media: Every medium in the order the prompt shows it; empty if that is `videos`, then `images`, uncut.
        layout: The pieces of `question` before, between and after the media, one more than there are media; empty
            if all media come before it.
        asked: The user's turn word for word, options included, if it is not `question` and then `options`.
        target: What supervised fine-tuning teaches, if that is more than `answer` (reasoning around it).
    """

    id: str
    question: str
    answer: str | None = None
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    category: str = NO_CATEGORY
    metadata: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    source: str = ""
    media: tuple[MediaRef, ...] = ()
    layout: tuple[str, ...] = ()
    asked: str | None = None
    target: str | None = None

    @property
    def seen(self) -> tuple[MediaRef, ...]:
        """Every medium in the order the prompt shows it."""
        return self.media or (
            *(MediaRef(path) for path in self.videos),
            *(MediaRef(path, is_image=True) for path in self.images),
        )

    @property
    def taught(self) -> str | None:
        """What supervised fine-tuning teaches."""
        return self.answer if self.target is None else self.target
