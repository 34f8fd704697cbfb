"""Questions about a world, with answers whose facts a regular expression can read back."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

from rlaif_fast.data.synthetic.drafts import (
    BARE,
    CATEGORIES,
    DIRECTION,
    FINITE,
    HORIZONTAL,
    LETTERS,
    NUMBERS,
    RELATION,
    TIME,
    VERTICAL,
    Domain,
    Draft,
    Slot,
    domain_of,
)
from rlaif_fast.data.synthetic.worlds import (
    COLORS,
    DIGITS,
    DIRECTIONS,
    LEVELS,
    SHAPES,
    TIMES,
    Event,
    World,
    beside,
    destination,
)


def drafts(world: World, rng: random.Random) -> list[Draft]:
    """Draw the questions to ask about a world, at most one per category."""
    found: dict[str, list[Draft]] = {}
    for draft in _all(_Asker(world, rng)):
        found.setdefault(draft.category, []).append(draft)
    return [rng.choice(found[category]) for category in CATEGORIES if category in found]


class _Asker:
    """A world, how its objects can be named, and what the answers can be."""

    def __init__(self, world: World, rng: random.Random) -> None:
        level = LEVELS[world.difficulty]
        self.world = world
        self.rng = rng
        self.things = world.things
        self.by_color = level.by_color
        moves = [event.actor for event in world.events if event.kind == "move"]
        self.travellers = moves if level.long_moves else []  # they leave their quadrant
        self.colors = domain_of(COLORS[: level.colors])
        self.shapes = domain_of(SHAPES[: level.shapes])
        self.digits = domain_of(DIGITS[: level.digits])
        lasting = [FINITE[kind] for kind in dict.fromkeys(level.lasting) if kind not in ("move", "hit")]
        plain = [*lasting, "appears", "vanishes", *(["stays"] if world.difficulty > 1 else [])]
        self.deeds = domain_of(
            (*(f"moves {d}" for d in DIRECTIONS), *plain),
            f"(?:(moves) (left|right|up|down)|({'|'.join(plain)}))",
        )
        moments = [FINITE[kind] for kind in level.timed]
        nouns = self.colors.values if level.by_color else self.shapes.values
        tail = " object" if level.by_color else ""
        self.happenings = domain_of(
            ("screen flashes", *(f"{n}{tail} {m}" for n, m in itertools.product(nouns, moments))),
            f"(?:(screen) (flashes)|({'|'.join(nouns)}){tail} ({'|'.join(moments)}))",
        )

    def color(self, index: int) -> Slot:
        return Slot(self.things[index].color, self.colors)

    def shape(self, index: int) -> Slot:
        return Slot(self.things[index].shape, self.shapes)

    def lone_shape(self, index: int) -> bool:
        """Whether no other object has its shape, so that "the circle" names it."""
        return sum(t.shape == self.things[index].shape for t in self.things) == 1

    def lone_color(self, index: int) -> bool:
        """Whether it keeps its colour and nothing else ever has it, so that "the red object" names it."""
        color = self.things[index].color
        changed = [e for e in self.world.events if e.kind == "change"]
        return sum(t.color == color for t in self.things) == 1 and not any(
            e.color == color or e.actor == index for e in changed
        )

    def noun(self, index: int) -> str | None:
        """ "red object" or "circle", by the level; None if that is ambiguous."""
        if self.by_color:
            return f"{self.things[index].color} object" if self.lone_color(index) else None
        return self.things[index].shape if self.lone_shape(index) else None

    def name(self, index: int) -> str | None:
        """ "the red object" or "the red circle", by the level; "the circle" if its colour changes."""
        thing = self.things[index]
        if self.by_color or any(e.kind == "change" and e.actor == index for e in self.world.events):
            noun = self.noun(index)
            return noun and f"the {noun}"
        return f"the {thing.color} {thing.shape}"

    def look(self, index: int) -> tuple[str | Slot, ...]:
        """What it looks like, as facts of an answer: "red object" or "red circle", by the level."""
        return (
            (self.color(index), " object") if self.by_color else (self.color(index), " ", self.shape(index))
        )

    def happening(self, event: Event) -> Slot | None:
        """The event as a fact of an answer; None if its actor cannot be named."""
        if event.kind == "flash":
            return Slot("screen flashes", self.happenings)
        noun = self.noun(event.actor)
        return Slot(f"{noun} {FINITE[event.kind]}", self.happenings) if noun else None


def _all(ask: _Asker) -> Iterator[Draft]:
    """Every question worth asking, in a random order of the objects."""
    world, rng = ask.world, ask.rng
    order = rng.sample(range(len(ask.things)), len(ask.things))
    yield from _about_looks(ask, order)
    yield from _about_places(ask, order)
    yield from _about_numbers(ask)
    yield from _about_deeds(ask, order)
    yield from _about_time(ask)
    if len(world.events) == 1 and world.events[0].kind in ("move", "grow", "shrink", "bounce", "turn"):
        actor = world.events[0].actor
        yield Draft(
            "synopsis",
            "information synopsis",
            "what happens in the video?",
            "a ",
            (*ask.look(actor), " ", Slot(_deed(world.events[0]), ask.deeds)),
        )
    yield from _about_digits(ask, order)


def _about_looks(ask: _Asker, order: list[int]) -> Iterator[Draft]:
    for k in order:
        thing = ask.things[k]
        if ask.lone_color(k):
            question = f"what shape is the {thing.color} object?"
            yield Draft(
                "shape", "object recognition", question, f"the {thing.color} object is a ", (ask.shape(k),)
            )
        if k not in ask.travellers:
            question = f"what color is the object in the {thing.quadrant}?"
            if not any(e.kind in ("change", "hit") for e in ask.world.events):
                yield Draft("color_at", "attribute perception", question, "the object is ", (ask.color(k),))
        if ask.by_color or not ask.lone_shape(k):
            continue
        change = next((e for e in ask.world.events if e.kind == "change" and e.actor == k), None)
        if change is None:
            question = f"what color is the {thing.shape}?"
            yield Draft("color", "attribute perception", question, f"the {thing.shape} is ", (ask.color(k),))
        else:
            question = f"what color is the {thing.shape} at the start?"
            yield Draft(
                "color_start", "attribute perception", question, f"the {thing.shape} is ", (ask.color(k),)
            )
            question = f"what color is the {thing.shape} at the end?"
            last = Slot(change.color, ask.colors)
            yield Draft("color_end", "attribute perception", question, f"the {thing.shape} is ", (last,))


def _about_places(ask: _Asker, order: list[int]) -> Iterator[Draft]:
    hits = [event for event in ask.world.events if event.kind == "hit"]
    nameable = [k for k in order if ask.noun(k) and not any(k in (e.actor, e.target) for e in hits)]
    for k in nameable:
        noun, quadrant = ask.noun(k), ask.things[k].quadrant
        if k not in ask.travellers:
            yield _place("place", f"where is the {noun}?", noun, quadrant)
            continue
        event = ask.world.event_of(k)
        assert event is not None
        for when, place in (("start", quadrant), ("end", destination(quadrant, event.direction))):
            yield _place(f"place_{when}", f"where is the {noun} at the {when}?", noun, place)
    for k, other in itertools.permutations([k for k in nameable if k not in ask.travellers], 2):
        relation = beside(ask.things[k], ask.things[other])
        if relation is not None and _meet(ask.world, k, other):
            one, two = ask.noun(k), ask.noun(other)
            question = f"where is the {one} relative to the {two}?"
            fact = Slot(relation, RELATION)
            yield Draft("relation", "spatial reasoning", question, f"the {one} is ", (fact,), f" the {two}.")


def _place(kind: str, question: str, noun: str | None, quadrant: str) -> Draft:
    vertical, horizontal = quadrant.split()
    facts = (Slot(vertical, VERTICAL), " ", Slot(horizontal, HORIZONTAL))
    return Draft(kind, "spatial perception", question, f"the {noun} is in the ", facts)


def _meet(world: World, one: int, other: int) -> bool:
    """Whether two objects are ever visible together."""

    def visible(index: int) -> set[int]:
        event = world.event_of(index)
        if event is None or event.kind not in ("appear", "vanish"):
            return {0, 1, 2, 3}
        return set(range(event.time + 1, 4)) if event.kind == "appear" else set(range(event.time + 1))

    return bool(visible(one) & visible(other))


def _about_numbers(ask: _Asker) -> Iterator[Draft]:
    count = len(ask.things)
    counts = LEVELS[ask.world.difficulty].counts
    kinds = [event.kind for event in ask.world.events]
    kind, when = "count", "in total"
    if ask.world.difficulty > 1 and kinds.count("appear") + kinds.count("vanish") == 1:
        count, counts = count - 1, tuple(number - 1 for number in counts)
        kind, when = ("count_end", "at the end") if "vanish" in kinds else ("count_start", "at the start")
    words = tuple(NUMBERS[number] for number in counts)
    phrases = tuple("is one object" if word == "one" else f"are {word} objects" for word in words)
    domain = Domain(phrases, rf"(?:is|are) ({'|'.join(words)}) objects?", words)
    fact = Slot(phrases[counts.index(count)], domain)
    yield Draft(kind, "counting problem", f"how many objects are there {when}?", "there ", (fact,))


def _about_deeds(ask: _Asker, order: list[int]) -> Iterator[Draft]:
    world = ask.world
    for event in world.events:
        if event.kind == "flash":
            continue
        k, name = event.actor, ask.name(event.actor)
        if event.kind == "hit":
            target = event.target
            facts: tuple[str | Slot, ...] = (ask.color(target), " ", ask.shape(target))
            question = f"what does {name} hit?"
            yield Draft("hit", "action recognition", question, f"{name} hits the ", facts)
            facts = (ask.color(k), " ", ask.shape(k))
            question = f"why does {ask.name(target)} move?"
            yield Draft("why", "action reasoning", question, "the ", facts, " hits it.")
            continue
        if name is not None and event.kind != "change" and _worth(ask, event):
            facts = (Slot(_deed(event), ask.deeds),)
            yield Draft("deed", "action recognition", f"what does {name} do?", f"{name} ", facts)
        if event.kind == "change":
            if name is not None:
                facts = (Slot(event.color, ask.colors),)
                question = f"what color does {name} become?"
                yield Draft("become", "action recognition", question, f"{name} becomes ", facts)
        elif sum(e.kind == event.kind for e in world.events) == 1:
            facts = ask.look(k)
            verb = FINITE[event.kind]
            yield Draft("which", "object reasoning", f"which object {verb}?", "the ", facts, f" {verb}.")
        flash = next((e for e in world.events if e.kind == "flash"), None)
        if event.kind == "turn" and flash is not None and flash.time == 1:
            when = ask.rng.choice(("before", "after"))
            facts = (Slot(event.direction if when == "before" else event.then, DIRECTION),)
            question = f"where does {name} move {when} the flash?"
            yield Draft(f"move_{when}", "action reasoning", question, "it moves ", facts)
    idle = [k for k in order if not any(k in (e.actor, e.target) for e in world.events)]
    if world.difficulty > 1 and idle and ask.rng.random() < 0.1:
        k = idle[0]
        facts = (Slot("stays", ask.deeds),)
        yield Draft("deed", "action recognition", f"what does {ask.name(k)} do?", f"{ask.name(k)} ", facts)


def _worth(ask: _Asker, event: Event) -> bool:
    """Thin out the more frequent deeds, to keep the answers balanced."""
    return event.kind not in ("appear", "vanish") or ask.rng.random() < 0.15


def _deed(event: Event) -> str:
    return f"moves {event.direction}" if event.kind == "move" else FINITE[event.kind]


def _about_time(ask: _Asker) -> Iterator[Draft]:
    timed = [event for event in ask.world.events if event.time >= 0]
    for event in timed:
        subject = "screen" if event.kind == "flash" else ask.noun(event.actor)
        if subject is None:
            continue
        bare = "flash" if event.kind == "flash" else BARE[event.kind]
        finite = "flashes" if event.kind == "flash" else FINITE[event.kind]
        question = f"when does the {subject} {bare}?"
        facts = (Slot(TIMES[event.time], TIME),)
        yield Draft("when", "temporal perception", question, f"the {subject} {finite} ", facts)
    if len(timed) < 2:
        return
    first, last = sorted(timed, key=lambda event: event.time)
    for word, event in (("first", first), ("last", last)):
        slot = ask.happening(event)
        if event.kind == "flash" and ask.rng.random() < 0.4:  # as with `_worth`
            continue
        if slot is not None:
            question = f"what happens {word}?"
            yield Draft(f"order_{word}", "temporal reasoning", question, f"{word} the ", (slot,))


def _about_digits(ask: _Asker, order: list[int]) -> Iterator[Draft]:
    for k in order:
        digit, name = ask.things[k].digit, ask.name(k)
        if not digit or any(e.kind == "change" and e.actor == k for e in ask.world.events):
            continue
        if name is not None:
            question = f"what number does {name} show?"
            yield Draft("read", "OCR problems", question, "it shows ", (Slot(digit, ask.digits),))
        question = f"which object shows {digit}?"
        yield Draft("find", "OCR problems", question, "the ", ask.look(k), f" shows {digit}.")


def _vocabulary() -> tuple[str, ...]:
    """Every token that a question, an answer or an option can hold if no object shows a digit."""
    text = " ".join(
        [
            *SHAPES,
            *COLORS,
            *DIRECTIONS,
            *TIMES,
            *NUMBERS[1:],
            *FINITE.values(),
            *BARE.values(),
            *RELATION.values,
            "top bottom stays flash flashes screen hit hits becomes become it",
            "what shape is the object? a color at where relative to how many objects are there in total?",
            "what happens in the video? what does do? which object moves? why does move?",
            "where does move before after the flash? when does appear? what happens first last?",
            "there is one object.",
        ]
    )
    return (*sorted(set(TOKEN.findall(text))), *LETTERS)


TOKEN = re.compile(r"\w+|[^\w\s]")  # words, and each punctuation mark
VOCABULARY: tuple[str, ...] = _vocabulary()
