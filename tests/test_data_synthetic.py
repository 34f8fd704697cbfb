"""The embedded dataset: worlds, pictures, questions, files."""

import dataclasses
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast.data import VOCABULARY, SyntheticConfig, chance_by_category, make_dataset, read_examples
from rlaif_fast.data.synthetic.dataset import SPLITS
from rlaif_fast.data.synthetic.drafts import CATEGORIES, CONFUSIONS
from rlaif_fast.data.synthetic.encode import encode_video
from rlaif_fast.data.synthetic.questions import TOKEN, drafts
from rlaif_fast.data.synthetic.render import render
from rlaif_fast.data.synthetic.worlds import LEVELS, SHAPES, Event, Thing, World, sample_world, share
from rlaif_fast.errors import UsageError
from rlaif_fast.video import decode, probe

SMALL = SyntheticConfig(
    label_noise=0.5,
    seed=3,
    sft_clips=24,
    rl_clips=6,
    validation_clips=6,
    test_clips=6,
    difficulty=(2, 1, 1),
    multiple_choice_fraction=0.3,
)
# The core categories of Video-MME, and the ones that the easiest level has to offer.
OCR = "OCR problems"
EASY = set(CATEGORIES) - {"action reasoning", OCR}

worlds = st.builds(
    lambda seed, difficulty: sample_world(f"h/{seed}", difficulty),
    st.integers(0, 10**9),
    st.sampled_from(sorted(LEVELS)),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "small", SMALL)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def thing(shape="circle", color="red", quadrant="top left"):
    return Thing(shape, color, quadrant, 0.18, (0.0, 0.0))


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


# Questions


@given(worlds, st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_questions_are_well_formed(world, seed):
    found = drafts(world, random.Random(seed))
    assert len({draft.category for draft in found}) == len(found) >= 2
    known = set(VOCABULARY)
    rng = random.Random(seed)
    for draft in found:
        right = re.fullmatch(draft.form, draft.answer)
        assert right and any(right.groups()), (draft.form, draft.answer)
        wrong = draft.corrupted(rng)
        match = re.fullmatch(draft.form, wrong.answer)
        assert match and match.groups() != right.groups()
        options, index = draft.choices(rng, 4)
        assert len(set(options)) == len(options) >= 2
        if draft.category != "counting problem":  # "two" in an option, "are two objects" in an answer
            assert draft.before + options[index] + draft.after == draft.answer
        texts = " ".join([draft.question, draft.answer, wrong.answer, *options])
        assert set(TOKEN.findall(texts)) <= known


def test_vocabulary_is_small_and_needed():
    assert 60 <= len(VOCABULARY) <= 90 and len(set(VOCABULARY)) == len(VOCABULARY)
    used = set("ABCD")
    for i in range(1500):
        for draft in drafts(sample_world(f"v/{i}", 1 + i % 3), random.Random(i)):
            used |= set(TOKEN.findall(f"{draft.question} {draft.answer}"))
    assert used == set(VOCABULARY)


def test_answers_follow_from_the_world():
    world = World(
        "known",
        1,
        (thing("circle", "red", "top left"), thing("square", "blue", "top right")),
        (Event("vanish", 0, 0), Event("flash", time=2)),
    )
    answers = {}
    for seed in range(60):
        answers.update({d.question: d.answer for d in drafts(world, random.Random(seed))})
    assert answers["how many objects are there in total?"] == "there are two objects."
    assert answers["which object vanishes?"] == "the red object vanishes."
    assert answers["what color is the object in the top right?"] == "the object is blue."
    assert answers["where is the red object relative to the blue object?"].endswith(
        "left of the blue object."
    )
    assert answers["when does the screen flash?"] == "the screen flashes at the end."
    assert answers["what shape is the red object?"] == "the red object is a circle."
    assert answers["what happens first?"] == "first the red object vanishes."
    assert answers["what happens last?"] == "last the screen flashes."


def evenness(difficulty, split, count=2500):
    """kind -> how often each fact is the answer."""
    facts = defaultdict(Counter)
    for i in range(count):
        world = sample_world(f"even/{split}/{i}", difficulty, SPLITS[split])
        for draft in drafts(world, random.Random(world.name)):
            facts[draft.kind][re.fullmatch(draft.form, draft.answer).groups()] += 1
    return facts


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
@pytest.mark.parametrize("split", ["rl", "test"])
def test_answers_are_even(difficulty, split):
    """The most frequent answer of a kind of question is at most a quarter more likely than by an even choice.

    Four standard errors are allowed beside it; synopses combine many facts and are left out.
    """
    for kind, counts in evenness(difficulty, split).items():
        total = sum(counts.values())
        if kind == "synopsis" or total < 300:
            continue
        even = 1 / len(counts)
        error = (even * (1 - even) / total) ** 0.5
        slack = 1.5 if kind.startswith("order") or kind in ("which", "hit", "why") else 1.25
        assert max(counts.values()) / total <= slack * even + 4 * error, (kind, counts.most_common(3))


def test_the_wording_of_a_question_does_not_tell_its_answer():
    """What the RL questions teach helps little on the test questions: chance stays near 1 in k."""

    def rows(split, count):
        from rlaif_fast.data import Example

        for i in range(count):
            world = sample_world(f"words/{split}/{i}", 1, SPLITS[split])
            for k, draft in enumerate(drafts(world, random.Random(world.name))):
                yield Example(
                    f"{i}-{k}",
                    draft.question,
                    draft.answer,
                    category=draft.category,
                    metadata={"form": draft.form},
                )

    chance = chance_by_category(list(rows("test", 1200)), reference=list(rows("rl", 2500)))
    limits = {
        "object recognition": 0.38,
        "attribute perception": 0.30,
        "spatial perception": 0.30,
        "counting problem": 0.38,
        "action recognition": 0.17,
        "temporal perception": 0.38,
        "temporal reasoning": 0.22,
        "object reasoning": 0.30,
        "spatial reasoning": 0.55,
        "information synopsis": 0.10,
    }
    assert set(chance) == EASY
    assert {name: value for name, value in chance.items() if value > limits[name]} == {}


def test_options_do_not_tell_which_is_right():
    """Neither the place of an option, nor its words in common with the others, gives the answer away."""
    places, central, total = Counter(), 0, 0
    for i in range(1500):
        rng = random.Random(i)
        for draft in drafts(sample_world(f"mc/{i}", 1), rng):
            options, index = draft.choices(rng, 4)
            if len(options) < 4:
                continue
            words = Counter(word for option in options for word in option.split())
            scores = [sum(words[word] for word in option.split()) / len(option.split()) for option in options]
            best = [k for k in range(4) if scores[k] == max(scores)]
            central += (index in best) / len(best)
            places[index] += 1
            total += 1
    assert total > 2000
    assert max(places.values()) / total < 0.28
    assert central / total < 0.29


# Files


def test_splits_and_rows(dataset):
    seen_ids, seen_videos = set(), {}
    for split in SPLITS:
        rows = rows_of(getattr(dataset, split))
        assert len({row["video"] for row in rows}) == getattr(SMALL, f"{split}_clips")
        for row in rows:
            assert row["id"] not in seen_ids
            seen_ids.add(row["id"])
            assert seen_videos.setdefault(row["metadata"]["world"], split) == split
            assert row["category"] in CATEGORIES and row["metadata"]["difficulty"] in LEVELS
            form = row["metadata"]["form"]
            assert re.fullmatch(form, row["answer"])
            if "options" in row:
                assert row["answer"] in "ABCD"[: len(row["options"])]
            assert row["metadata"].get("corrupted", False) is ("clean_answer" in row["metadata"])
            if row["metadata"].get("corrupted"):
                assert split == "sft"
                assert row["answer"] != row["metadata"]["clean_answer"]
                assert re.fullmatch(form, row["metadata"]["clean_answer"])
    noisy = [bool(row["metadata"].get("corrupted")) for row in rows_of(dataset.sft)]
    assert abs(np.mean(noisy) - 0.5) < 4 * 0.5 / len(noisy) ** 0.5


def test_a_careless_annotator_takes_the_same_values_for_others(tmp_path):
    config = SyntheticConfig(
        sft_clips=60, rl_clips=4, validation_clips=0, test_clips=0, label_confusion=1.0, questions_per_clip=4
    )
    made = make_dataset(tmp_path / "confused", config)
    rows = rows_of(made.sft)
    wrong = [row for row in rows if row["metadata"].get("corrupted")]
    assert 0.2 < len(wrong) / len(rows) < 0.45
    for row in wrong:
        clean = row["metadata"]["clean_answer"]
        assert row["answer"] != clean and re.fullmatch(row["metadata"]["form"], row["answer"])
        assert any(
            re.sub(rf"\b{seen}\b", taken, clean) == row["answer"] for seen, taken in CONFUSIONS.items()
        )
    assert not any(row["metadata"].get("corrupted") for row in rows_of(made.rl))


def test_easy_clips_offer_the_categories():
    counts = Counter()
    for i in range(200):
        found = drafts(sample_world(f"c/{i}", 1), random.Random(i))
        counts.update(draft.category for draft in found)
        assert 5 <= len(found) <= 9
    assert set(counts) == EASY and len(EASY) >= 8
    assert min(counts.values()) > 15


def test_hard_clips_offer_action_reasoning():
    counts = Counter(
        draft.category for i in range(400) for draft in drafts(sample_world(f"c/{i}", 3), random.Random(i))
    )
    assert set(counts) == set(CATEGORIES) - {OCR}


def test_clips_are_what_was_drawn(dataset):
    row = rows_of(dataset.test)[0]
    path = dataset.root / row["video"]
    info = probe(str(path))
    assert (info.codec, info.width, info.height, info.frames) == ("vp9", 64, 64, 12)
    assert info.fps == pytest.approx(6.0)
    world = sample_world(row["metadata"]["world"], row["metadata"]["difficulty"], SPLITS["test"])
    shown = decode(str(path), range(12)).numpy().astype(int)
    assert np.abs(shown - render(world)).mean() < 12  # lossy, and chroma at half the size


def test_same_seed_same_bytes(dataset, tmp_path):
    again = make_dataset(tmp_path / "again", SMALL)
    assert digests(again.root) == digests(dataset.root)
    fields = dataclasses.asdict(SMALL)
    script = f"""
from rlaif_fast.data import SyntheticConfig, make_dataset
make_dataset({str(tmp_path / "other")!r}, SyntheticConfig(**{fields!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(PYTHONHASHSEED="7"))
    assert digests(tmp_path / "other") == digests(dataset.root)


def test_other_seed_other_files(dataset, tmp_path):
    other = make_dataset(tmp_path / "d", dataclasses.replace(SMALL, seed=4))
    same = {name for name, digest in digests(other.root).items() if digests(dataset.root).get(name) == digest}
    assert same == set()


def environment(**extra):
    import os

    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **extra}


@pytest.mark.parametrize("codec,container", [("vp9", "mp4"), ("vp9", "webm"), ("h264", "mp4")])
def test_codecs_and_containers(tmp_path, codec, container):
    config = SyntheticConfig(
        sft_clips=1,
        rl_clips=0,
        validation_clips=0,
        test_clips=0,
        codec=codec,
        container=container,
        width=96,
        height=64,
        num_frames=16,
        fps=8.0,
    )
    one, two = (make_dataset(tmp_path / name, config) for name in "ab")
    assert digests(one.root) == digests(two.root)
    info = probe(read_examples(one.sft)[0].videos[0])
    assert (info.codec, info.width, info.height, info.frames) == (codec, 96, 64, 16)


def test_reuse_and_refusal(dataset, tmp_path):
    before = digests(dataset.root)
    calls = []
    again = make_dataset(dataset.root, SMALL, progress=lambda done, total: calls.append((done, total)))
    assert again.reused and not dataset.reused and calls == []
    with pytest.raises(UsageError, match="another configuration"):
        make_dataset(dataset.root, dataclasses.replace(SMALL, seed=9))
    assert digests(dataset.root) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not a dataset made here"):
            make_dataset(tmp_path / "mine", SMALL, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="is a file"):
        make_dataset(tmp_path / "mine" / "thesis.txt", SMALL)


def test_two_processes_may_make_the_same(tmp_path):
    script = f"""
from rlaif_fast.data import SyntheticConfig, make_dataset
config = SyntheticConfig(sft_clips=12, rl_clips=0, validation_clips=0, test_clips=0)
print(make_dataset({str(tmp_path / "shared")!r}, config).reused)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment())
        for _ in range(2)
    ]
    said = [process.communicate()[0].decode().strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "False" in said
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    assert len(list((tmp_path / "shared" / "videos" / "sft").iterdir())) == 12


def test_overwrite_replaces_a_dataset(tmp_path):
    tiny = SyntheticConfig(sft_clips=2, rl_clips=0, validation_clips=0, test_clips=0)
    make_dataset(tmp_path / "d", tiny)
    changed = make_dataset(tmp_path / "d", dataclasses.replace(tiny, sft_clips=1), overwrite=True)
    assert not changed.reused and len(list((changed.root / "videos" / "sft").iterdir())) == 1


def test_nothing_is_left_when_making_fails(tmp_path):
    tiny = SyntheticConfig(sft_clips=3, rl_clips=0, validation_clips=0, test_clips=0)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "d", tiny, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_noise": 1.5},
        {"difficulty": (0, 0, 0)},
        {"width": 63},
        {"num_frames": 2},
        {"codec": "theora"},
        {"container": "webm", "codec": "h264"},
        {"num_options": 9},
        {"test_clips": -1},
    ],
)
def test_wrong_configuration_is_named(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SyntheticConfig(**wrong)


def test_encode_names_what_is_wrong(tmp_path):
    good = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="frames"):
        encode_video(tmp_path / "a.mp4", good[0])
    with pytest.raises(ValueError, match="even"):
        encode_video(tmp_path / "a.mp4", good[:, :31])
    with pytest.raises(ValueError, match="codec"):
        encode_video(tmp_path / "a.mp4", good, codec="gif")
    with pytest.raises(ValueError, match="path"):
        encode_video(tmp_path / "a.avi", good)
    assert list(tmp_path.iterdir()) == []
