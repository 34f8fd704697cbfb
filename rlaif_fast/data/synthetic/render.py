"""Draws a world: anti-aliased shapes over a noisy, textured background."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlaif_fast.data.synthetic.worlds import LEVELS, Event, Thing, World

Frames = NDArray[np.uint8]  # (F, H, W, 3)
Plane = NDArray[np.float32]  # (H, W)

RGB = {
    "red": (222, 48, 48),
    "green": (52, 190, 74),
    "blue": (62, 92, 238),
    "yellow": (240, 216, 60),
    "purple": (176, 66, 206),
    "orange": (244, 138, 34),
}

# Moments as fractions of the clip, placed so that 4 or more frames sampled evenly show every change.
CHANGE_AT = (0.25, 0.5, 0.75)
FLASH_AT = ((1 / 12, 5 / 12), (5 / 12, 8 / 12), (9 / 12, 1.0))
_FLASH = 0.6  # how far a flash pulls the picture towards white
_TRAVEL = 0.25  # length of a move within a quadrant, as a fraction of the frame; twice that into the next
_SMALL, _LARGE = 0.09, 0.22  # radii between which an object grows and shrinks
_CELL = 0.24  # cell size of a digit of 3 by 5 cells, as a fraction of the radius of the object that shows it
_GLYPHS = {  # rows of three bits, top first
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Pose:
    """An object at one moment; lengths are fractions of the frame."""

    x: float
    y: float
    radius: float
    color: str
    visible: bool


def render(world: World, *, width: int = 64, height: int = 64, num_frames: int = 12) -> Frames:
    """Draw the clip of a world.

    Args:
        world: What to draw. Its name seeds the background and the noise.
        width: Pixels, even.
        height: Pixels, even.
        num_frames: At least 4.

    Returns:
        (F, H, W, 3) uint8 RGB.
    """
    level = LEVELS[world.difficulty]
    rng = np.random.Generator(np.random.PCG64(random.Random(f"{world.name}/pixels").getrandbits(64)))
    background = _background(rng, width, height, level.texture)
    flashes = [FLASH_AT[event.time] for event in world.events if event.kind == "flash"]
    noise = rng.standard_normal((num_frames, height, width, 1), dtype=np.float32) * np.float32(level.noise)
    frames = np.empty((num_frames, height, width, 3), np.float32)
    for f in range(num_frames):
        moment = f / num_frames
        frame = background.copy()
        for index, thing in enumerate(world.things):
            pose = pose_at(world, index, moment, f / (num_frames - 1))
            if pose.visible:
                _paint(frame, thing, pose)
                if thing.digit:
                    _write(frame, thing.digit, pose)
        if any(begin - 1e-9 <= moment < end - 1e-9 for begin, end in flashes):
            frame += (250.0 - frame) * np.float32(_FLASH)
        frames[f] = frame
    frames += noise
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def pose_at(world: World, index: int, moment: float, progress: float) -> Pose:
    """Position and appearance of an object at a moment.

    Args:
        world: The world.
        index: Index of the object.
        moment: Share of the clip before this frame, in [0, 1): decides timed events.
        progress: 0 at the first frame, 1 at the last: drives lasting events.
    """
    thing = world.things[index]
    x, y = _home(thing)
    radius, color, visible = thing.radius, thing.color, True
    event = world.event_of(index)
    hit = next((e for e in world.events if e.target == index), None)
    if hit is not None:  # pushed away by the other, from the middle of the clip on
        towards = 1.0 if _home(thing)[0] > _home(world.things[hit.actor])[0] else -1.0
        x += towards * (0.14 * max(0.0, 2 * progress - 1) - 0.03)
    elif event is not None and event.kind == "hit":
        start = x
        other = world.things[event.target]
        towards = 1.0 if _home(other)[0] > x else -1.0
        stop = _home(other)[0] - towards * (thing.radius + other.radius + 0.03)
        y = _home(other)[1]
        x = start + (stop - start) * min(1.0, 2 * progress)
    elif event is not None and event.time >= 0:
        happened = moment >= CHANGE_AT[event.time] - 1e-9
        if event.kind == "appear":
            visible = happened
        elif event.kind == "vanish":
            visible = not happened
        elif event.kind == "change" and happened:
            color = event.color
    elif event is not None:
        dx, dy, radius = _lasting(event, radius, progress, LEVELS[world.difficulty].long_moves)
        x, y = x + dx, y + dy
    return Pose(x, y, radius, color, visible)


def _home(thing: Thing) -> tuple[float, float]:
    vertical, horizontal = thing.quadrant.split()
    x = 0.25 if horizontal == "left" else 0.75
    y = 0.25 if vertical == "top" else 0.75
    return x + thing.jitter[0], y + thing.jitter[1]


def _lasting(event: Event, radius: float, progress: float, long_moves: bool) -> tuple[float, float, float]:
    """Offset and radius of an object during a lasting event."""
    if event.kind in ("grow", "shrink"):
        part = progress if event.kind == "grow" else 1.0 - progress
        return 0.0, 0.0, _SMALL + (_LARGE - _SMALL) * part
    ux, uy = _STEP[event.direction]
    if event.kind == "move":
        along = 2 * _TRAVEL * progress if long_moves else _TRAVEL * (progress - 0.5)
        return ux * along, uy * along, radius
    if event.kind == "bounce":  # to the edge at half-time and back
        reach = 0.25 - radius
        along = reach - 0.4 * abs(progress - 0.5)
        return ux * along, uy * along, radius
    vx, vy = _STEP[event.then]
    half = _TRAVEL / 2
    first, second = min(1.0, 2 * progress), max(0.0, 2 * progress - 1)
    return (
        ux * half * (2 * first - 1) + vx * half * (2 * second - 1),
        uy * half * (2 * first - 1) + vy * half * (2 * second - 1),
        radius,
    )


def _background(rng: np.random.Generator, width: int, height: int, contrast: float) -> NDArray[np.float32]:
    """(H, W, 3) float32: a grey with a tint, two gratings and smooth blotches."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    texture = np.zeros((height, width))
    for _ in range(2):
        angle, waves, phase = rng.uniform(0, math.pi), rng.uniform(1.0, 5.0), rng.uniform(0, 2 * math.pi)
        texture += np.sin(2 * math.pi * waves * (math.cos(angle) * x + math.sin(angle) * y) + phase) / 2
    coarse = rng.uniform(-1, 1, (6, 6))
    rows, columns = np.linspace(0, 5, height), np.linspace(0, 5, width)
    blotches = np.stack([np.interp(columns, np.arange(6), row) for row in coarse])  # (6, W)
    texture += np.stack([np.interp(rows, np.arange(6), column) for column in blotches.T], axis=1)
    base = rng.uniform(40, 70) + rng.uniform(-8, 8, 3)
    return (base + contrast * texture[..., None]).astype(np.float32)


def _paint(frame: NDArray[np.float32], thing: Thing, pose: Pose) -> None:
    """Blend one object into a frame (H, W, 3), with a white rim."""
    height, width, _ = frame.shape
    side = min(width, height)
    radius = pose.radius * side
    # Only the window around the object is touched.
    left, right = (int(pose.x * width + sign * (radius + 2)) for sign in (-1, 1))
    top, bottom = (int(pose.y * height + sign * (radius + 2)) for sign in (-1, 1))
    left, top = max(0, left), max(0, top)
    right, bottom = min(width, right + 1), min(height, bottom + 1)
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - pose.x * width)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - pose.y * height)
    distance = _DISTANCE[thing.shape](x, y, radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    rim = np.clip(distance + 0.03 * side, 0, 1)[..., None]
    color = np.asarray(RGB[pose.color], np.float32)
    color = color + (np.float32(255) - color) * rim
    window = frame[top:bottom, left:right]
    window += (color - window) * cover


def _write(frame: NDArray[np.float32], digit: str, pose: Pose) -> None:
    """Draw a digit in white on a dark plate in the middle of an object."""
    height, width, _ = frame.shape
    cell = _CELL * pose.radius * min(width, height)
    rows = np.array([[row >> bit & 1 for bit in (2, 1, 0)] for row in _GLYPHS[digit]])
    plate = np.pad(rows, 1)  # (7, 5), a margin of one cell
    # The cell of each pixel centre, counted from the plate's corner.
    x = np.floor((np.arange(width) + 0.5 - pose.x * width) / cell + plate.shape[1] / 2).astype(int)
    y = np.floor((np.arange(height) + 0.5 - pose.y * height) / cell + plate.shape[0] / 2).astype(int)
    columns = np.nonzero((x >= 0) & (x < plate.shape[1]))[0]
    lines = np.nonzero((y >= 0) & (y < plate.shape[0]))[0]
    inside = plate[np.ix_(y[lines], x[columns])]
    frame[np.ix_(lines, columns)] = np.where(inside, np.float32(250), np.float32(20))[..., None]


# Distances in pixels to the outline of a shape of about the size of the circle, negative inside.
def _circle(x: Plane, y: Plane, radius: float) -> Plane:
    return np.sqrt(x * x + y * y) - np.float32(radius)


def _square(x: Plane, y: Plane, radius: float) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.92 * radius)


def _triangle(x: Plane, y: Plane, radius: float) -> Plane:
    y = y - np.float32(0.2 * radius)  # its centre of mass is below the middle of its height
    sides = np.abs(x) * np.float32(math.cos(math.pi / 6)) - y * np.float32(0.5)
    return np.maximum(sides, y) - np.float32(0.6 * radius)


def _star(x: Plane, y: Plane, radius: float) -> Plane:
    angle = np.arctan2(x, -y)
    wedge = 2 * math.pi / 5
    folded = np.abs((angle + wedge / 2) % wedge - wedge / 2)  # angle to the nearest tip
    length = np.sqrt(x * x + y * y)
    tip, notch = 1.2 * radius, 0.52 * radius
    # The edge runs from the tip (tip, 0) to the notch at half a wedge.
    nx, ny = notch * math.sin(wedge / 2), tip - notch * math.cos(wedge / 2)
    norm = math.hypot(nx, ny)
    edge = (length * np.cos(folded) - tip) * (nx / norm) + length * np.sin(folded) * (ny / norm)
    return edge.astype(np.float32)


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}
