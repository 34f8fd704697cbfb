"""Digits on objects of the embedded dataset: they can be read, nothing else gives them away or changes."""

import json
import random
import re
from collections import Counter, defaultdict

import pytest

from rlaif_fast.data import Example, SyntheticConfig, chance_by_category, make_dataset
from rlaif_fast.data.synthetic.dataset import SPLITS
from rlaif_fast.data.synthetic.drafts import CATEGORIES
from rlaif_fast.data.synthetic.questions import drafts
from rlaif_fast.data.synthetic.render import pose_at, render
from rlaif_fast.data.synthetic.worlds import DIGITS, LEVELS, sample_world, with_digits
from rlaif_fast.errors import UsageError

OCR = "OCR problems"
FONT = {  # as a reader sees them
    "0": "### #.# #.# #.# ###",
    "1": ".#. ##. .#. .#. ###",
    "2": "### ..# ### #.. ###",
    "3": "### ..# .## ..# ###",
    "4": "#.# #.# ### ..# ..#",
    "5": "### #.. ### ..# ###",
    "6": "### #.. ### #.# ###",
    "7": "### ..# .#. .#. .#.",
    "8": "### #.# ### #.# ###",
    "9": "### #.# ### ..# ###",
}


def world_with_digits(name, difficulty, split="test"):
    return with_digits(sample_world(name, difficulty, SPLITS[split]))


def ocr_drafts(world):
    return [draft for draft in drafts(world, random.Random(world.name)) if draft.category == OCR]


def read(frame, pose):
    """The digit in a picture at the place of an object, cell by cell."""
    side, cell = len(frame), 0.24 * pose.radius * len(frame)
    rows = []
    for row in range(-2, 3):
        y = int(pose.y * side + row * cell)
        bright = [frame[y, int(pose.x * side + column * cell)].mean() > 130 for column in (-1, 0, 1)]
        rows.append("".join("#" if on else "." for on in bright))
    return next((digit for digit, drawn in FONT.items() if drawn.split() == rows), None)


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_every_digit_can_be_read_in_the_picture(difficulty):
    for i in range(12):
        world = world_with_digits(f"pixels/{i}", difficulty)
        frames = render(world, width=192, height=192)
        for index, thing in enumerate(world.things):
            seen = set()
            for f, frame in enumerate(frames):
                pose = pose_at(world, index, f / len(frames), f / (len(frames) - 1))
                if pose.visible:
                    seen.add(read(frame, pose))
            assert thing.digit in seen and len(thing.digit) == 1


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_answers_follow_from_what_the_objects_show(difficulty):
    kinds = Counter()
    for i in range(300):
        world = world_with_digits(f"answers/{i}", difficulty)
        assert len({thing.digit for thing in world.things}) == len(world.things)
        for draft in ocr_drafts(world):
            kinds[draft.kind] += 1
            shown = re.search(r"shows? (\d)", f"{draft.question} {draft.answer}")
            assert shown is not None and re.fullmatch(draft.form, draft.answer)
            (owner,) = [thing for thing in world.things if thing.digit == shown[1]]
            text = draft.question if draft.kind == "read" else draft.answer
            named = [word for word in (owner.color, owner.shape) if word in text]
            others = [t for t in world.things if all(word in (t.color, t.shape) for word in named)]
            assert others == [owner]
    assert min(kinds["read"], kinds["find"]) > 80


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_blind_answers_are_at_chance(difficulty):
    """Neither a question's wording nor how often an answer is right tells more than a draw among the digits."""
    facts = defaultdict(Counter)
    for i in range(1500):
        for draft in ocr_drafts(world_with_digits(f"even/{i}", difficulty)):
            match = re.fullmatch(draft.form, draft.answer)
            facts[draft.kind][match.groups()] += 1
    for counts in facts.values():
        total, even = sum(counts.values()), 1 / len(counts)
        assert max(counts.values()) / total <= 1.25 * even + 4 * (even * (1 - even) / total) ** 0.5

    def rows(split, count):
        for i in range(count):
            for draft in ocr_drafts(world_with_digits(f"words/{split}/{i}", difficulty, split)):
                metadata = {"form": draft.form}
                yield Example(f"{split}-{i}", draft.question, draft.answer, category=OCR, metadata=metadata)

    chance = chance_by_category(list(rows("test", 800)), reference=list(rows("rl", 1600)))
    assert chance[OCR] < {1: 0.30, 2: 0.20, 3: 0.15}[difficulty]


def test_all_twelve_task_types_of_video_mme_are_asked():
    asked = {
        draft.category
        for i in range(150)
        for draft in drafts(world_with_digits(f"all/{i}", 1 + i % 3), random.Random(i))
    }
    assert asked == set(CATEGORIES) and len(CATEGORIES) == 12
    plain = {
        d.category for i in range(150) for d in drafts(sample_world(f"all/{i}", 1 + i % 3), random.Random(i))
    }
    assert plain == set(CATEGORIES) - {OCR}


def rows_by_video(file):
    found = defaultdict(list)
    for line in file.read_text().splitlines():
        row = json.loads(line)
        found[row["video"]].append(row)
    return found


def test_clips_without_digits_are_as_they_were(tmp_path):
    sizes = {"sft_clips": 10, "rl_clips": 0, "validation_clips": 0, "test_clips": 0, "seed": 4}
    plain = make_dataset(tmp_path / "plain", SyntheticConfig(**sizes))
    mixed = make_dataset(tmp_path / "mixed", SyntheticConfig(**sizes, ocr_fraction=0.5))
    again = make_dataset(tmp_path / "again", SyntheticConfig(**sizes, ocr_fraction=0.5))
    before, after = rows_by_video(plain.sft), rows_by_video(mixed.sft)
    same = [(plain.root / video).read_bytes() == (mixed.root / video).read_bytes() for video in before]
    assert 0 < sum(same) < 10
    for video, alike in zip(before, same):
        assert (before[video] == after[video]) or not alike
        assert alike or any(row["category"] == OCR for row in drafts_of(after[video]))
        assert (mixed.root / video).read_bytes() == (again.root / video).read_bytes()
    assert mixed.sft.read_text() == again.sft.read_text()
    # Datasets that were made before there was a choice are found again.
    assert SyntheticConfig().digest().startswith("da23a74467395549")
    assert SyntheticConfig(ocr_fraction=0.1).digest() != SyntheticConfig().digest()


def drafts_of(rows):
    """What the clip of some rows can be asked, all of it."""
    metadata = rows[0]["metadata"]
    world = sample_world(metadata["world"], metadata["difficulty"], SPLITS["sft"])
    return [{"category": d.category} for d in drafts(with_digits(world), random.Random(0))]


def test_a_wrong_share_is_named():
    with pytest.raises(UsageError, match=r"ocr_fraction: expected in \[0, 1\], got 1.5"):
        SyntheticConfig(ocr_fraction=1.5)
    assert len(DIGITS) == 10 == len(set(DIGITS))
