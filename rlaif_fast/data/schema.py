"""The dataset row: what is asked about which media. One JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question about one or more videos or images.

    Attributes:
        id: Unique within its file.
        question: The question, without the options.
        answer: The reference answer; None where there is none. For multiple choice the letter, "A" first.
        videos: Paths, resolved against the folder of the dataset file.
        images: Paths, resolved likewise.
        options: The choices of a multiple-choice question, without letters; empty for open questions.
        category: What accuracy is reported by.
        metadata: Whatever else the row carries.
        system: System prompt, where the row gives one.
        source: "file:line", for messages.
    """

    id: str
    question: str
    answer: str | None = None
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    category: str = "all"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    source: str = ""
