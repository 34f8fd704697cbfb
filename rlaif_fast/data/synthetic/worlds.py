"""Worlds: what is in a clip and what happens in it, as symbols. Rendering and questions read nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left", "right", "up", "down")
TIMES = ("at the start", "in the middle", "at the end")
DIGITS = ("1", "7", "4", "0", "2", "5", "3", "8", "6", "9")  # the most distinct first

_TRIES = 200


@dataclass(frozen=True)
class Level:
    """What a difficulty level draws from.

    Attributes:
        shapes: Number of shapes in use, the first of SHAPES.
        colors: Number of colours in use, the first of COLORS.
        counts: Numbers of objects, equally likely.
        lasting: Kinds of lasting event, equally likely ("move" once for each direction).
        timed: Kinds of timed event of an object, equally likely.
        by_color: Whether questions name objects by colour ("the red object"), else by shape as well.
        long_moves: Whether a move leads into the next quadrant, an empty one; else it stays within its own.
        radius: Smallest and largest radius, as a fraction of the shorter side.
        noise: Standard deviation of the noise of each frame, in grey levels.
        texture: Contrast of the background, in grey levels.
        digits: Number of digits in use if objects show one, the first of DIGITS.
    """

    shapes: int
    colors: int
    counts: tuple[int, ...]
    lasting: tuple[str, ...]
    timed: tuple[str, ...]
    by_color: bool
    long_moves: bool
    radius: tuple[float, float]
    noise: float
    texture: float
    digits: int


LEVELS = {
    1: Level(
        shapes=3,
        colors=4,
        counts=(1, 2, 3),
        lasting=("move", "move", "move", "move", "grow", "shrink"),
        timed=("appear", "vanish"),
        by_color=True,
        long_moves=True,
        radius=(0.2, 0.22),
        noise=3.0,
        texture=8.0,
        digits=4,
    ),
    2: Level(
        shapes=4,
        colors=6,
        counts=(2, 3, 4),
        lasting=("move", "move", "move", "move", "grow", "shrink", "bounce", "turn"),
        timed=("appear", "vanish", "change"),
        by_color=False,
        long_moves=False,
        radius=(0.14, 0.17),
        noise=5.0,
        texture=14.0,
        digits=7,
    ),
    3: Level(
        shapes=4,
        colors=6,
        counts=(2, 3, 4),
        lasting=("move", "move", "move", "move", "grow", "shrink", "bounce", "turn", "hit", "hit"),
        timed=("appear", "vanish", "change"),
        by_color=False,
        long_moves=False,
        radius=(0.11, 0.13),
        noise=9.0,
        texture=20.0,
        digits=10,
    ),
}


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        shape: One of SHAPES.
        color: One of COLORS, at the start.
        quadrant: One of QUADRANTS; where it is at the start.
        radius: Fraction of the shorter side of the frame.
        jitter: Offset of its centre from the centre of the quadrant, as fractions of the frame.
        digit: One of DIGITS that it shows; "" for none. Not part of the story (`World.signature`).
    """

    shape: str
    color: str
    quadrant: str
    radius: float
    jitter: tuple[float, float]
    digit: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happens.

    Attributes:
        kind: Lasts the whole clip ("move", "grow", "shrink", "bounce", "turn", "hit"), or happens at one of TIMES
            ("appear", "vanish", "change", "flash").
        actor: Index of the object; -1 for the screen.
        time: Index into TIMES; -1 for a lasting event.
        direction: "move": where to; "turn": where to at first; "bounce": towards which edge.
        then: "turn": where to afterwards.
        color: "change": the new colour.
        target: "hit": index of the object that is hit; -1 otherwise.
    """

    kind: str
    actor: int = -1
    time: int = -1
    direction: str = ""
    then: str = ""
    color: str = ""
    target: int = -1


@dataclass(frozen=True)
class World:
    """Everything there is to know about a clip.

    Attributes:
        name: Its seed, unique within a dataset.
        difficulty: Key of LEVELS.
        things: One to four objects, in distinct quadrants.
        events: One or two events, of distinct actors.
    """

    name: str
    difficulty: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]

    @property
    def signature(self) -> str:
        """The world without its name, jitter and order of objects: equal for clips that tell the same story."""
        lines = []
        for index, thing in enumerate(self.things):
            deeds = [
                (
                    e.kind,
                    e.time,
                    e.direction,
                    e.then,
                    e.color,
                    self.things[e.target].quadrant if e.target >= 0 else "",
                )
                for e in self.events
                if e.actor == index
            ]
            lines.append(f"{thing.quadrant}: {thing.color} {thing.shape} {sorted(deeds)}")
        flashes = [e.time for e in self.events if e.kind == "flash"]
        return f"{self.difficulty} | {' | '.join(sorted(lines))} | {flashes}"

    def event_of(self, index: int) -> Event | None:
        """The event whose actor is the object, or None."""
        return next((e for e in self.events if e.actor == index), None)


def share(signature: str) -> float:
    """Map a signature to [0, 1), uniformly and permanently; splits own disjoint parts of that interval."""
    digest = hashlib.sha256(signature.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def sample_world(name: str, difficulty: int, interval: tuple[float, float] = (0.0, 1.0)) -> World:
    """Draw the world that `name` seeds, among those whose `share` is in `interval`.

    Every choice that a question can ask for is uniform and independent of what the question names.
    """
    rng = random.Random(name)
    count = rng.choice(LEVELS[difficulty].counts)
    # The events are drawn first and kept while their actors are redrawn: a split owns only some of the
    # stories, and rejecting whole stories would make some events rarer in it than others.
    for _ in range(_TRIES):
        plan = rng.random()
        for _ in range(_TRIES):
            things = _sample_things(rng, difficulty, count)
            events = _sample_events(random.Random(plan), difficulty, things)
            if LEVELS[difficulty].long_moves and events[0].kind == "move":
                things = _make_way(rng, things, events[0])
            world = World(name, difficulty, things, events)
            if interval[0] <= share(world.signature) < interval[1]:
                return world
    raise AssertionError(f"no world of difficulty {difficulty} in {interval} after {_TRIES**2} tries")


def with_digits(world: World) -> World:
    """The same world with a different digit on each object, drawn independently of everything else in it."""
    digits = DIGITS[: LEVELS[world.difficulty].digits]
    drawn = random.Random(f"{world.name}/digits").sample(digits, len(world.things))
    things = [dataclasses.replace(thing, digit=digit) for thing, digit in zip(world.things, drawn)]
    return dataclasses.replace(world, things=tuple(things))


def _sample_things(rng: random.Random, difficulty: int, count: int) -> tuple[Thing, ...]:
    level = LEVELS[difficulty]
    shapes, colors = SHAPES[: level.shapes], COLORS[: level.colors]
    if difficulty == 1:  # every shape and every colour at most once
        looks = list(zip(rng.sample(colors, count), rng.sample(shapes, count)))
    elif difficulty == 2:  # every colour at most once
        looks = [(color, rng.choice(shapes)) for color in rng.sample(colors, count)]
    else:  # every pair at most once
        looks = rng.sample([(color, shape) for color in colors for shape in shapes], count)
    return tuple(
        Thing(
            shape,
            color,
            quadrant,
            round(rng.uniform(*level.radius), 4),
            (round(rng.uniform(-0.015, 0.015), 4), round(rng.uniform(-0.015, 0.015), 4)),
        )
        for (color, shape), quadrant in zip(looks, rng.sample(QUADRANTS, count))
    )


def _make_way(rng: random.Random, things: tuple[Thing, ...], move: Event) -> tuple[Thing, ...]:
    """Reassign quadrants, so that the one the mover goes to is empty."""
    ends = {"left": "right", "right": "left", "up": "bottom", "down": "top"}[move.direction]
    start = rng.choice([quadrant for quadrant in QUADRANTS if ends in quadrant.split()])
    goal = destination(start, move.direction)
    others = iter(rng.sample([q for q in QUADRANTS if q not in (start, goal)], 2))
    return tuple(
        dataclasses.replace(thing, quadrant=start if index == move.actor else next(others))
        for index, thing in enumerate(things)
    )


def destination(quadrant: str, direction: str) -> str:
    """The quadrant next to another in a direction."""
    vertical, horizontal = quadrant.split()
    if direction in ("left", "right"):
        return f"{vertical} {direction}"
    return f"{'top' if direction == 'up' else 'bottom'} {horizontal}"


def _sample_events(rng: random.Random, difficulty: int, things: tuple[Thing, ...]) -> tuple[Event, ...]:
    level = LEVELS[difficulty]
    actors = rng.sample(range(len(things)), min(2, len(things)))
    times = rng.sample(range(len(TIMES)), 2)
    # A lone object has only the flash besides it, so it gets a timed event less often, to keep "the flash" rare.
    if rng.random() < (0.6 if len(things) == 1 else 0.4):
        main = _lasting(rng, level, things, actors[0])
        busy = {main.actor, main.target}
        if main.kind == "turn" and rng.random() < 0.7:  # "before the flash" and "after the flash"
            return main, Event("flash", time=1)
        rest = [index for index in actors if index not in busy]
        draw = rng.random()
        if rest and draw < 0.4:
            return main, _timed(rng, level, things, rest[0], times[0])
        if draw < 0.65:
            return main, Event("flash", time=times[0])
        return (main,)
    first = _timed(rng, level, things, actors[0], times[0])
    if len(actors) == 1 or rng.random() < 0.2:
        return first, Event("flash", time=times[1])
    return first, _timed(rng, level, things, actors[1], times[1], taken=first.color)


def _lasting(rng: random.Random, level: Level, things: tuple[Thing, ...], actor: int) -> Event:
    kind = rng.choice(level.lasting)
    vertical, horizontal = things[actor].quadrant.split()
    if kind == "move":
        return Event(kind, actor, direction=rng.choice(DIRECTIONS))
    if kind == "bounce":
        return Event(kind, actor, direction=rng.choice((horizontal, "up" if vertical == "top" else "down")))
    if kind == "turn":
        first = rng.choice(DIRECTIONS)
        across = ("up", "down") if first in ("left", "right") else ("left", "right")
        return Event(kind, actor, direction=first, then=rng.choice(across))
    if kind == "hit":
        targets = [
            k for k in range(len(things)) if beside(things[k], things[actor]) in ("left of", "right of")
        ]
        if not targets:
            return Event("move", actor, direction=rng.choice(DIRECTIONS))
        return Event(kind, actor, target=targets[0])
    return Event(kind, actor)


def _timed(
    rng: random.Random, level: Level, things: tuple[Thing, ...], actor: int, time: int, taken: str = ""
) -> Event:
    kind = rng.choice(level.timed)
    if kind != "change":
        return Event(kind, actor, time)
    if sum(thing.shape == things[actor].shape for thing in things) > 1:  # "the circle" would be ambiguous
        return Event(rng.choice(("appear", "vanish")), actor, time)
    used = {thing.color for thing in things} | {taken}
    return Event(kind, actor, time, color=rng.choice([c for c in COLORS[: level.colors] if c not in used]))


def beside(thing: Thing, other: Thing) -> str | None:
    """Where `thing` is relative to `other`: "left of", "right of", "above", "below", or None if diagonal."""
    (v, h), (ov, oh) = thing.quadrant.split(), other.quadrant.split()
    if v == ov and h != oh:
        return f"{h} of"
    if h == oh and v != ov:
        return "above" if v == "top" else "below"
    return None
