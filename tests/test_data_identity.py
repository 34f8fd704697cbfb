"""Splits are kept apart by what the files hold, however their paths are spelt."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from datetime import date

import pytest

from rlaif_fast.data import Example, identity
from rlaif_fast.data.identity import digest_of_metadata, digest_of_rows, digests_of_media
from rlaif_fast.digests import sampled_digest
from rlaif_fast.trainer import datasets
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.video.refs import Cut, MediaRef


def spell_parent(folder):
    return "../media/0.mp4"


def spell_dot(folder):
    return "./sub/.././0.mp4"


def spell_absolute(folder):
    return str(folder / "media" / "0.mp4")


def spell_symlink(folder):
    (folder / "media" / "link.mp4").symlink_to("0.mp4")
    return "link.mp4"


def spell_hard_link(folder):
    os.link(folder / "media" / "0.mp4", folder / "media" / "hard.mp4")
    return "hard.mp4"


def spell_copy(folder):
    shutil.copy(folder / "media" / "0.mp4", folder / "media" / "copy.mp4")
    return "copy.mp4"


def spell_linked_folder(folder):
    (folder / "media" / "other").symlink_to(folder / "media")
    return "other/0.mp4"


def spell_second_video(folder):
    return ["9.mp4", "0.mp4"]


SPELLINGS = [value for name, value in list(globals().items()) if name.startswith("spell_")]


def write(path, media):
    rows = [
        {"question": f"what {i}?", "answer": "x", "video" if isinstance(m, str) else "videos": m}
        for i, m in enumerate(media)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media" / "sub").mkdir(parents=True)
    for number in range(12):
        (tmp_path / "media" / f"{number}.mp4").write_bytes(f"clip {number:02}".encode())  # all of one size
    return tmp_path


@pytest.mark.parametrize("spell", SPELLINGS)
def test_a_medium_of_the_test_is_never_learned_from(folder, spell):
    data = write(folder / "media" / "data.jsonl", ["1.mp4", spell(folder), "2.mp4"])
    held = write(folder / "media" / "held.jsonl", ["0.mp4"])
    other = write(folder / "media" / "other.jsonl", ["3.mp4"])
    notes = []
    loaded = datasets.load_data(
        TrainConfig(data=data, validation_data=other, test_data=held), note=notes.append
    )
    assert [row.question for row in loaded.rl] == ["what 0?", "what 2?"]
    assert any("Left out: 1 rl rows" in note for note in notes)


@pytest.mark.parametrize("spell", SPELLINGS)
def test_what_is_held_out_is_held_out_whole(folder, spell):
    from rlaif_fast.data import read_examples
    from rlaif_fast.data.identity import contents, media_of

    names = [f"{number}.mp4" for number in range(12)]
    data = write(folder / "media" / "data.jsonl", [*names, spell(folder)])
    rows = read_examples(data)
    known = contents(rows)
    for seed in range(12):
        parts = datasets.hold_out(rows, 0.2, seed, known)
        held = [media_of(part, known) for part in parts]
        assert sum(map(len, parts)) == 13
        assert held[0].isdisjoint(held[1]) and held[0].isdisjoint(held[2]) and held[1].isdisjoint(held[2])


def test_each_file_is_read_once_to_keep_the_splits_apart(folder, monkeypatch):
    """Clips as folders of frames are a million files, each of them of some other's size."""
    read = Counter()
    original = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda file: read.update([file[0]]) or original(file))
    data = write(folder / "media" / "data.jsonl", [f"{number}.mp4" for number in range(12)])
    held = write(folder / "media" / "held.jsonl", ["3.mp4", "4.mp4"])
    for config in (TrainConfig(data=data), TrainConfig(data=data, test_data=held)):
        read.clear()
        loaded = datasets.load_data(config)
        assert loaded.validation and loaded.test
        assert len(read) == 12 and set(read.values()) == {1}


def test_other_files_of_the_same_size_are_other_media(folder):
    data = write(folder / "media" / "data.jsonl", [f"{number}.mp4" for number in range(3)])
    held, other = (write(folder / "media" / f"{n}.jsonl", [f"{n}.mp4"]) for n in (5, 6))
    loaded = datasets.load_data(TrainConfig(data=data, validation_data=held, test_data=other))
    assert len(loaded.rl) == 3


def test_a_question_about_text_alone_is_not_learned_from_and_measured(folder):
    def write_texts(name, *numbers):
        file = folder / f"{name}.jsonl"
        rows = [{"question": f"{n}?", "answer": "x"} for n in numbers]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    data, held, other = (
        write_texts("data", *range(8), *range(8)),
        write_texts("held", 3, 4),
        write_texts("other", 9),
    )
    loaded = datasets.load_data(TrainConfig(data=data, validation_data=other, test_data=held))
    assert sorted({row.question for row in loaded.rl}) == ["0?", "1?", "2?", "5?", "6?", "7?"]
    loaded = datasets.load_data(TrainConfig(data=data))
    asked = [{row.question for row in rows} for rows in (loaded.rl, loaded.validation, loaded.test)]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 8


def frames_of(folder, name, *pictures):
    (folder / "media" / name).mkdir()
    for number, picture in enumerate(pictures):
        (folder / "media" / name / f"{number}.jpg").write_text(picture)
    return name


def test_videos_of_frames_that_begin_black_are_other_videos(folder):
    """Yet a copy of all frames is the same video, and so is one that shares files with it."""
    names = [frames_of(folder, f"frames{i}", "black", f"shows {i:02}", "black") for i in range(6)]
    part = ["frames5/1.jpg", "frames5/2.jpg"]
    frames_of(folder, "copy", "black", "shows 05", "black")
    rows = [{"question": f"what {i}?", "video": m} for i, m in enumerate([*names, "copy", part])]
    rows.append({"question": "what picture?", "image": "frames5/1.jpg"})
    data = folder / "media" / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held, other = (write(folder / "media" / f"{n}.jsonl", [n]) for n in ("frames5", "0.mp4"))
    config = TrainConfig(
        data=str(data),
        validation_data=other,
        test_data=held,
        sft="none",
        oracle="callable",
        oracle_options={"function": "math:fsum"},
    )
    loaded = datasets.load_data(config)
    assert [row.question for row in loaded.rl] == [f"what {i}?" for i in range(5)]


@pytest.mark.parametrize(
    "own", [(), ("validation",), ("test",), ("validation", "test")], ids=lambda own: "+".join(own) or "none"
)
def test_rows_are_held_out_for_the_splits_without_a_file_alone(folder, own):
    names = [f"{number}.mp4" for number in range(8)]
    data = write(folder / "media" / "data.jsonl", names)
    files = {f"{split}_data": write(folder / "media" / f"{split}.jsonl", ["9.mp4"]) for split in own}
    loaded = datasets.load_data(TrainConfig(data=data, holdout_fraction=0.25, **files))
    sizes = {split: len(getattr(loaded, split)) for split in ("validation", "test")}
    assert sizes == {split: 1 if split in own else 2 for split in sizes}
    assert len(loaded.rl) == len(loaded.sft) == 8 - 2 * (2 - len(own))


@pytest.mark.parametrize("own", ["validation", "test"])
def test_what_is_held_out_is_apart_from_the_split_that_has_a_file(folder, own):
    names = [f"{number}.mp4" for number in range(8)]
    data = write(folder / "media" / "data.jsonl", names)
    file = write(folder / "media" / "own.jsonl", names[:5])  # of which a blind draw would take some
    loaded = datasets.load_data(TrainConfig(data=data, holdout_fraction=0.4, **{f"{own}_data": file}))
    seen = [{video for row in split for video in row.videos} for split in (loaded.validation, loaded.test)]
    assert sorted(map(len, seen)) == [1, 5] and not seen[0] & seen[1]
    assert len(loaded.rl) == len(loaded.sft) == 2


def test_the_digest_of_rows_is_of_what_they_ask_and_show():
    row = Example("a", "what?", "red", videos=("old/clip.mp4",))
    same = digest_of_rows([row])
    assert same.startswith("1 rows, ")
    assert digest_of_rows([replace(row, videos=("moved/clip.mp4",), source="x:1")]) == same
    cut = (MediaRef("old/clip.mp4", cut=Cut(video_start=1.0)),)
    others = [replace(row, answer="blue"), replace(row, options=("a",)), replace(row, id="b")]
    others += [replace(row, videos=("old/other.mp4",)), replace(row, media=cut)]
    digests = {digest_of_rows([other]) for other in others} | {same, digest_of_rows([row, row])}
    assert len(digests) == len(others) + 2
    second = replace(row, id="c")
    assert digest_of_rows([row, second]) != digest_of_rows([second, row])


def test_the_digest_of_metadata_is_of_all_that_rows_carry():
    row = Example("a", "what?", "red", metadata={"form": "(.*)", "more": {"b": [1], "a": 2}})
    same = digest_of_metadata([row])
    assert digest_of_metadata([replace(row, metadata={"more": {"a": 2, "b": [1]}, "form": "(.*)"})]) == same
    others = [{"form": ".*", "more": {"b": [1], "a": 2}}, {"form": "(.*)"}, {"when": date(2026, 1, 1)}, {}]
    digests = [digest_of_metadata([replace(row, metadata=other)]) for other in others]
    assert len({same, *digests}) == 5
    assert digest_of_metadata([row, replace(row, metadata={})]) != digest_of_metadata(
        [replace(row, metadata={}), row]
    )


def test_the_digest_of_media_is_of_what_files_hold(folder, monkeypatch):
    media = folder / "media"

    def digests():
        rows = [Example(f"{n}", "what?", videos=(str(media / f"{n}.mp4"),)) for n in range(3)]
        pictures = MediaRef(str(media), frames=(str(media / "4.mp4"), str(media / "5.mp4")))
        return digests_of_media({"sft": rows, "rl": rows, "test": [Example("t", "what?", media=(pictures,))]})

    before = digests()
    assert before["sft"] == before["rl"] != before["test"]
    for one, other in (("0.mp4", "1.mp4"), ("4.mp4", "5.mp4")):  # trade places
        first, second = (media / one).read_bytes(), (media / other).read_bytes()
        (media / one).write_bytes(second), (media / other).write_bytes(first)
    after = digests()
    assert all(before[split] != after[split] for split in before)
    read = []
    monkeypatch.setattr(
        identity, "sampled_digest", lambda path, *args, **sizes: read.append(path.name) or path.name
    )
    digests()
    assert sorted(read) == ["0.mp4", "1.mp4", "2.mp4", "4.mp4", "5.mp4"]
    (media / "0.mp4").unlink()
    monkeypatch.undo()
    assert digests()["test"] == after["test"]  # what cannot be read is for decoding to tell


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_a_sampled_digest_sees_the_size_and_the_blocks(tmp_path, size):
    path = tmp_path / "file"

    def digest(content):
        path.write_bytes(content)
        return sampled_digest(path, blocks=4, block=16)

    content = bytes(i % 251 for i in range(size))
    assert digest(content) == digest(content) != digest(content + b"?")
    seen = {i for i in range(size) if digest(content[:i] + b"\xff" + content[i + 1 :]) != digest(content)}
    starts = [(size - 16) * number // 3 for number in range(4)]
    read = {i for start in starts for i in range(start, start + 16)} if size > 64 else set(range(size))
    assert seen == read and (size <= 64 or {0, size - 1} <= seen)
