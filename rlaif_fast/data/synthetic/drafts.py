"""A question in the making: its answer in parts, which can be stated rightly, wrongly or as options."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rlaif_fast.data.synthetic.worlds import DIRECTIONS, TIMES

CATEGORIES = (
    "object recognition",
    "attribute perception",
    "spatial perception",
    "counting problem",
    "action recognition",
    "temporal perception",
    "temporal reasoning",
    "object reasoning",
    "spatial reasoning",
    "action reasoning",
    "information synopsis",
    "OCR problems",
)
NUMBERS = ("zero", "one", "two", "three", "four")
LETTERS = "ABCD"

# What a careless annotator consistently mistakes for something else: a third of all open answers hold one of these.
CONFUSIONS = {
    "blue": "green",
    "triangle": "circle",
    "three": "two",
    "bottom right": "bottom left",
    "moves left": "moves right",
    "moves up": "moves down",
    "grows": "shrinks",
    "vanishes": "appears",
    "in the middle": "at the end",
    "above": "below",
}

FINITE = {
    "move": "moves",
    "grow": "grows",
    "shrink": "shrinks",
    "bounce": "bounces",
    "turn": "turns",
    "appear": "appears",
    "vanish": "vanishes",
    "change": "changes color",
}
BARE = {"appear": "appear", "vanish": "vanish", "change": "change color"}


@dataclass(frozen=True)
class Domain:
    """The values that one fact of an answer can have.

    Attributes:
        values: As written in the answer.
        pattern: Matches exactly the values; its groups capture the facts.
        options: As written in a multiple-choice option.
    """

    values: tuple[str, ...]
    pattern: str
    options: tuple[str, ...]


def domain_of(values: tuple[str, ...], pattern: str = "") -> Domain:
    return Domain(values, pattern or f"({'|'.join(values)})", values)


VERTICAL, HORIZONTAL = domain_of(("top", "bottom")), domain_of(("left", "right"))
DIRECTION, TIME = domain_of(DIRECTIONS), domain_of(TIMES)
RELATION = domain_of(("left of", "right of", "above", "below"))


@dataclass(frozen=True)
class Slot:
    """One fact of an answer: its value and what else it could be."""

    value: str
    domain: Domain


@dataclass(frozen=True)
class Draft:
    """An open question before it is worded as a row.

    Attributes:
        kind: Name of the template.
        category: One of CATEGORIES.
        question: The question.
        before: The answer up to its facts.
        facts: The facts and the text between them.
        after: The rest of the answer.
    """

    kind: str
    category: str
    question: str
    before: str
    facts: tuple[str | Slot, ...]
    after: str = "."

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.before + "".join(p if isinstance(p, str) else p.value for p in self.facts) + self.after

    @property
    def form(self) -> str:
        """A pattern that every well-formed answer matches in full; the groups that matched are its facts."""
        middle = "".join(re.escape(p) if isinstance(p, str) else p.domain.pattern for p in self.facts)
        return (re.escape(self.before) + middle + re.escape(self.after)).replace(r"\ ", " ")

    def corrupted(self, rng: random.Random) -> Draft:
        """The same draft with one fact replaced by another value of its domain."""
        slots = [index for index, part in enumerate(self.facts) if isinstance(part, Slot)]
        chosen = rng.choice(slots)
        slot = self.facts[chosen]
        assert isinstance(slot, Slot)
        other = Slot(rng.choice([v for v in slot.domain.values if v != slot.value]), slot.domain)
        facts = (*self.facts[:chosen], other, *self.facts[chosen + 1 :])
        return Draft(self.kind, self.category, self.question, self.before, facts, self.after)

    @property
    def confused(self) -> str | None:
        """The answer of an annotator who makes the CONFUSIONS; None if nothing in it is confusable."""
        facts = "".join(p if isinstance(p, str) else p.value for p in self.facts)
        seen = next((seen for seen in CONFUSIONS if re.search(rf"\b{seen}\b", facts)), None)
        if seen is None:
            return None
        return self.before + re.sub(rf"\b{seen}\b", CONFUSIONS[seen], facts) + self.after

    def choices(self, rng: random.Random, count: int) -> tuple[tuple[str, ...], int]:
        """Options for a multiple-choice form, and the index of the right one.

        The wrong ones are drawn evenly from all other values, not from those near the right one, so that the
        options do not give it away.
        """
        right = self._option([p if isinstance(p, str) else p.value for p in self.facts])
        size = 1
        for part in self.facts:
            size *= 1 if isinstance(part, str) else len(part.domain.values)
        options = [right]
        while len(options) < min(count, size):
            option = self._option(
                [p if isinstance(p, str) else rng.choice(p.domain.values) for p in self.facts]
            )
            if option not in options:
                options.append(option)
        rng.shuffle(options)
        return tuple(options), options.index(right)

    def _option(self, texts: list[str]) -> str:
        return "".join(
            text if isinstance(part, str) else part.domain.options[part.domain.values.index(text)]
            for part, text in zip(self.facts, texts)
        )
