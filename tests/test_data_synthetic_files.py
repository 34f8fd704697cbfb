"""Generated datasets on disk: rows, clips, the same bytes for the same seed."""

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlaif_fast.data import SyntheticConfig, make_dataset, read_examples
from rlaif_fast.data.synthetic.dataset import SPLITS
from rlaif_fast.data.synthetic.drafts import CATEGORIES, CONFUSIONS
from rlaif_fast.data.synthetic.encode import encode_video
from rlaif_fast.data.synthetic.questions import drafts
from rlaif_fast.data.synthetic.render import render
from rlaif_fast.data.synthetic.worlds import LEVELS, sample_world
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


@pytest.mark.parametrize(("ending", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_no_worker_outlives_the_command(tmp_path, ending, code):
    command = [sys.executable, "-m", "rlaif_fast.data", "make", str(tmp_path / "made")]
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not any(tmp_path.rglob("*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.05)
    # A terminal sends a Ctrl-C to all processes of the command.
    (os.killpg if ending == "SIGINT" else os.kill)(process.pid, getattr(signal, ending))
    # The workers have this pipe too: it is read to its end only once they are gone.
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code
    if ending != "SIGKILL":
        assert said.splitlines() == ["interrupted" if ending == "SIGINT" else "terminated by SIGTERM"]
        assert list(tmp_path.iterdir()) == []


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
