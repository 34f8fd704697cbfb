"""The embedded dataset: worlds, pictures, questions, files."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_parts import thing, worlds

from rlaif_fast.data.synthetic.dataset import SPLITS
from rlaif_fast.data.synthetic.render import render
from rlaif_fast.data.synthetic.worlds import LEVELS, SHAPES, Event, World, sample_world, share

# Worlds


@given(worlds)
@settings(max_examples=200, deadline=None)
def test_a_world_is_well_formed(world):
    level = LEVELS[world.difficulty]
    assert len(world.things) in level.counts
    assert len({t.quadrant for t in world.things}) == len(world.things)
    assert len({(t.color, t.shape) for t in world.things}) == len(world.things)
    assert 1 <= len(world.events) <= 2
    actors = [event.actor for event in world.events]
    assert len(set(actors)) == len(actors)
    times = [event.time for event in world.events if event.time >= 0]
    assert len(set(times)) == len(times), "two events at one time have no order"


@given(worlds, st.sampled_from([48, 64, 96]), st.sampled_from([8, 12, 16]))
@settings(max_examples=25, deadline=None)
def test_objects_stay_apart_and_inside(world, side, frames):
    """Every visible object shows its colour in most of its own disc, in every frame, alone."""
    from rlaif_fast.data.synthetic.render import pose_at

    for f in range(frames):
        poses = [pose_at(world, k, f / frames, f / (frames - 1)) for k in range(len(world.things))]
        shown = [pose for pose in poses if pose.visible]
        for pose in shown:
            assert pose.radius * 0.75 <= min(pose.x, 1 - pose.x) + 0.02
            assert pose.radius * 0.75 <= min(pose.y, 1 - pose.y) + 0.02
        for i, one in enumerate(shown):
            for other in shown[:i]:
                distance = np.hypot(one.x - other.x, one.y - other.y)
                assert distance >= 0.85 * (one.radius + other.radius), (world, f)


def test_signature_ignores_order_and_jitter_but_no_fact():
    one, other = thing(), thing("square", "blue", "bottom right")
    world = World("a", 1, (one, other), (Event("vanish", 1, 0),))
    swapped = World("b", 1, (other, dataclasses.replace(one, jitter=(0.01, 0.0))), (Event("vanish", 0, 0),))
    assert world.signature == swapped.signature
    for changed in (
        World("a", 1, (one, other), (Event("vanish", 0, 0),)),
        World("a", 1, (one, other), (Event("vanish", 1, 1),)),
        World("a", 1, (one, dataclasses.replace(other, color="green")), (Event("vanish", 1, 0),)),
        World("a", 2, (one, other), (Event("vanish", 1, 0),)),
    ):
        assert changed.signature != world.signature


def test_splits_are_disjoint_in_stories():
    bounds = sorted(SPLITS.values())
    assert bounds[0][0] == 0.0 and bounds[-1][1] == 1.0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    stories = {
        split: {sample_world(f"{split}/{i}", 1, interval).signature for i in range(300)}
        for split, interval in SPLITS.items()
    }
    assert all(SPLITS[s][0] <= share(story) < SPLITS[s][1] for s in SPLITS for story in stories[s])
    assert len(set.union(*stories.values())) == sum(map(len, stories.values()))


# Pictures


def test_a_change_shows_in_the_frame_it_should():
    still = World("still", 1, (thing(),), ())
    before = render(still).astype(int)
    for time, frame in enumerate((3, 6, 9)):
        gone = render(dataclasses.replace(still, events=(Event("vanish", 0, time),))).astype(int)
        changed = np.flatnonzero(np.abs(gone - before).max(axis=(1, 2, 3)) > 40)
        assert changed.tolist() == list(range(frame, 12))
        flash = render(dataclasses.replace(still, events=(Event("flash", time=time),))).astype(int)
        bright = np.flatnonzero((flash - before).mean(axis=(1, 2, 3)) > 40)
        assert 3 <= len(bright) <= 4 and bright[0] >= [1, 5, 9][time] and bright[-1] <= [4, 7, 11][time]


@pytest.mark.parametrize(
    "direction,axis,sign", [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
@pytest.mark.parametrize("difficulty", [1, 2])
def test_a_move_goes_where_it_says(direction, axis, sign, difficulty):
    start = {"left": "top right", "right": "top left", "up": "bottom left", "down": "top left"}[direction]
    world = World("move", difficulty, (thing(quadrant=start),), (Event("move", 0, direction=direction),))
    red = render(world).astype(int)
    red = red[..., 0] - red[..., 1:].max(-1)  # (F, H, W)
    centres = [np.argwhere(frame > 60).mean(0) for frame in red]
    travelled = (centres[-1] - centres[0]) / 64
    assert sign * travelled[axis] == pytest.approx(0.5 if difficulty == 1 else 0.25, abs=0.06)
    assert abs(travelled[1 - axis]) < 0.03


@pytest.mark.parametrize("kind", ["appear", "vanish", "change", "flash"])
@pytest.mark.parametrize("sampled", ["4 even", "6 even", "6 every other", "6 middles"])
def test_a_few_even_frames_tell_all_times_apart(kind, sampled):
    indices = {
        "4 even": [0, 4, 7, 11],
        "6 even": [0, 2, 4, 7, 9, 11],
        "6 every other": [0, 2, 4, 6, 8, 10],
        "6 middles": [1, 3, 5, 7, 9, 11],
    }[sampled]
    actor = -1 if kind == "flash" else 0
    color = "blue" if kind == "change" else ""
    seen = {}
    for time in range(3):
        world = World("when", 2, (thing(),), (Event(kind, actor, time, color=color),))
        frames = render(world).astype(float)[indices]
        # (frames, RGB), noise lost
        looks = np.round(frames[:, 6:26, 6:26].mean(axis=(1, 2)) / 40).astype(int)
        seen[time] = tuple(looks.ravel())
        assert len({tuple(look) for look in looks}) > 1
    assert len(set(seen.values())) == 3


def test_every_shape_looks_different():
    pictures = [render(World("same", 1, (thing(shape),), ()))[0].astype(float)[:, :, 0] for shape in SHAPES]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (np.abs(one - other) > 60).sum() > 20
