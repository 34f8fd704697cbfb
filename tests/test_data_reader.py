"""Reading datasets: the formats in use, and rows that are wrong."""

import importlib
import json
import logging
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast.data import (
    Example,
    chance_accuracy,
    chance_by_category,
    read_examples,
    read_report,
    summarise,
)
from rlaif_fast.data.__main__ import main
from rlaif_fast.data.converters import FORMATS, RowError, convert
from rlaif_fast.data.sources import rows_of
from rlaif_fast.data.synthetic.encode import encode_video
from rlaif_fast.errors import UsageError


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with two videos and an image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    (folder / "empty").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    for name in ("a.mp4", "b.mp4"):
        encode_video(folder / name, frames)
    Image.fromarray(frames[0]).save(folder / "c.png")
    return folder


@pytest.fixture
def write(media, tmp_path):
    """Write rows (or raw lines) into a file whose media are in `media`."""

    def write_rows(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


def one(write, media, row, **options):
    (example,) = read_examples(write(row), media_root=media, **options)
    return example


NATIVE = {"video": "a.mp4", "question": "what moves?", "answer": "the cat."}

# The row as published, and what has to come of it: question, answer, videos, images, options, category.
PUBLISHED = {
    "native": (
        {**NATIVE, "category": "object reasoning", "id": "x1", "metadata": {"world": 3}},
        ("what moves?", "the cat.", ["a.mp4"], [], (), "object reasoning"),
    ),
    "native, several media": (
        {"videos": ["a.mp4", "b.mp4"], "images": ["c.png"], "question": "which?", "answer": "a"},
        ("which?", "a", ["a.mp4", "b.mp4"], ["c.png"], (), "all"),
    ),
    "native, options": (
        {**NATIVE, "options": ["a dog", "the cat."], "answer": "B"},
        ("what moves?", "B", ["a.mp4"], [], ("a dog", "the cat."), "all"),
    ),
    "Video-R1, choice": (
        {
            "problem_id": 2,
            "problem": "What appears on the screen in Russian during the missile's ascent?",
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": ["A. A YouTube subscription prompt", "B. A successful launch message", "C. A date"],
            "process": "",
            "solution": "<answer>A</answer>",
            "path": "./a.mp4",
            "data_source": "LLaVA-Video-178K",
        },
        (
            "What appears on the screen in Russian during the missile's ascent?",
            "A",
            ["a.mp4"],
            [],
            ("A YouTube subscription prompt", "A successful launch message", "A date"),
            "multiple choice",
        ),
    ),
    "Video-R1, image": (
        {
            "problem_id": 9,
            "problem": "How large is the angle?",
            "data_type": "image",
            "problem_type": "numerical",
            "options": [],
            "solution": "<answer>30</answer>",
            "path": "c.png",
        },
        ("How large is the angle?", "30", [], ["c.png"], (), "numerical"),
    ),
    "LLaVA, open": (
        {
            "id": "ytb_7nRmsEw7nsE",
            "video": "a.mp4",
            "data_source": "0_30_s_youtube_v0_1",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat does the man do?"},
                {"from": "gpt", "value": "The man walks."},
            ],
        },
        ("What does the man do?", "The man walks.", ["a.mp4"], [], (), "all"),
    ),
    "LLaVA, choice": (
        {
            "id": "v_1",
            "video": "a.mp4",
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\nWhich color is it?\nA. Red.\nB. Blue.\nC. Green.\n"
                    "Please provide your answer by stating the letter followed by the full option.",
                },
                {"from": "gpt", "value": "B. Blue."},
            ],
        },
        (
            "Which color is it?\nPlease provide your answer by stating the letter followed by the full option.",
            "B",
            ["a.mp4"],
            [],
            ("Red.", "Blue.", "Green."),
            "all",
        ),
    ),
    "ms-swift, messages": (
        {
            "messages": [
                {"role": "system", "content": "You are helpful."},
                {"role": "user", "content": "<video>What is in the video?"},
                {"role": "assistant", "content": "A cat."},
            ],
            "videos": ["a.mp4"],
        },
        ("What is in the video?", "A cat.", ["a.mp4"], [], (), "all"),
    ),
    "ms-swift, query": (
        {
            "system": "Be short.",
            "query": "<image><video>What differs?",
            "response": "Colors.",
            "images": ["c.png"],
        }
        | {"videos": ["a.mp4"]},
        ("What differs?", "Colors.", ["a.mp4"], ["c.png"], (), "all"),
    ),
    "ms-swift, path in the tag": (
        {"query": "<video>a.mp4</video>What is it?", "response": "A dog."},
        ("What is it?", "A dog.", ["a.mp4"], [], (), "all"),
    ),
    "TRL, prompt and completion": (
        {
            "prompt": [{"role": "user", "content": "What happens?"}],
            "completion": [{"role": "assistant", "content": "It falls."}],
            "images": ["c.png"],
        },
        ("What happens?", "It falls.", [], ["c.png"], (), "all"),
    ),
    "TRL, content lists": (
        {
            "prompt": [
                {"role": "system", "content": [{"type": "text", "text": "Think."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": "a.mp4", "text": None},
                        {"type": "text", "text": "What happens?", "video": None},
                    ],
                },
            ],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "It falls."}]}],
        },
        ("What happens?", "It falls.", ["a.mp4"], [], (), "all"),
    ),
    "TRL, placeholders": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
            ],
            "images": [{"path": "c.png", "bytes": None}],
        },
        ("What is it?", "A dog.", [], ["c.png"], (), "all"),
    ),
    "TRL, plain prompt with a solution": (
        {"prompt": "How many?", "solution": "<think>one, two</think><answer>2</answer>", "video": "a.mp4"},
        ("How many?", "2", ["a.mp4"], [], (), "all"),
    ),
    "OpenAI, video_url": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": "file://a.mp4"}},
                        {"type": "text", "text": "Who?"},
                    ],
                },
                {"role": "assistant", "content": "Me."},
            ],
        },
        ("Who?", "Me.", ["a.mp4"], [], (), "all"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats(name, write, media):
    row, (question, answer, videos, images, options, category) = PUBLISHED[name]
    example = one(write, media, row)
    assert (example.question, example.answer, example.options) == (question, answer, options)
    assert example.videos == tuple(str(media / video) for video in videos)
    assert example.images == tuple(str(media / image) for image in images)
    assert example.category == category
    assert example.source.endswith("data.jsonl:1")


def test_the_rest_of_a_row_is_metadata(write, media):
    row, _ = PUBLISHED["Video-R1, choice"]
    assert one(write, media, row).metadata == {"process": "", "data_source": "LLaVA-Video-178K"}
    row, _ = PUBLISHED["native"]
    example = one(write, media, {**row, "license": "CC0"})
    assert example.metadata == {"license": "CC0", "world": 3} and example.id == "x1"
    assert one(write, media, PUBLISHED["ms-swift, messages"][0]).system == "You are helpful."
    assert one(write, media, PUBLISHED["ms-swift, query"][0]).system == "Be short."


def test_every_turn_of_a_conversation_is_a_question(write, media):
    turns = [("human", "<image>\nWho?"), ("gpt", "A man."), ("human", "Where?"), ("gpt", "At home.")]
    row = {"id": 7, "video": "a.mp4", "conversations": [{"from": f, "value": v} for f, v in turns]}
    examples = read_examples(write(row), media_root=media)
    assert [(e.id, e.question, e.answer) for e in examples] == [
        ("7#1", "Who?", "A man."),
        ("7#2", "Where?", "At home."),
    ]
    assert all(e.videos == (str(media / "a.mp4"),) for e in examples)


@pytest.mark.parametrize(
    "answer,letter",
    [("B", "B"), ("(B)", "B"), ("B.", "B"), ("B. a cat", "B"), ("a cat", "B"), ("A CAT ", "B"), ("A", "A")],
)
def test_answers_of_choices_become_letters(write, media, answer, letter):
    row = {**NATIVE, "options": ["A) a dog", "B) a cat"], "answer": answer}
    example = one(write, media, row)
    assert (example.answer, example.options) == (letter, ("a dog", "a cat"))


@pytest.mark.parametrize(
    ("options", "letter"),
    [(["A. B", "B. A", "C. C"], "A"), (["B", "A", "C"], "B")],
    ids=["labelled", "texts"],
)
def test_a_letter_is_the_label_where_options_are_labelled_letters(write, media, options, letter):
    assert one(write, media, {**NATIVE, "options": options, "answer": "A"}).answer == letter


def test_options_that_only_look_labelled_stay(write, media):
    row = {**NATIVE, "options": ["A. Lincoln", "J. Adams"], "answer": "A. Lincoln"}
    assert one(write, media, row).options == ("A. Lincoln", "J. Adams")


WRONG = {
    "not json": ('{"video": "a.mp4",', "not JSON"),
    "not an object": ("[1]", "expected a JSON object, got list"),
    "no format": ({"video": "a.mp4", "text": "x"}, "none of the keys"),
    "misspelt key": ({"video": "a.mp4", "questoin": "x", "answer": "y"}, "did you mean 'question'"),
    "no answer": ({"video": "a.mp4", "question": "x"}, "no answer"),
    "misspelt answer": (
        {"video": "a.mp4", "question": "x", "anwser": "y"},
        "did you mean 'answer' by 'anwser'",
    ),
    "empty answer": ({**NATIVE, "answer": "  "}, "no answer"),
    "answer of a wrong type": ({**NATIVE, "answer": ["x"]}, "answer: expected a text, got list"),
    "empty question": ({**NATIVE, "question": " "}, "question: is empty"),
    "only a tag": ({**NATIVE, "question": "<video>"}, "the question is empty"),
    "missing video": ({**NATIVE, "video": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
    "folder without frames": ({**NATIVE, "video": "empty"}, "is a folder without pictures"),
    "media by another name": (
        {"question": "x", "answer": "y", "video_path": "v/a.mp4"},
        "no video and no image, but 'video_path' names 'v/a.mp4'; call it 'video'",
    ),
    "a path without a format": ({"question": "x", "answer": "y", "path": "v/A.MP4"}, "but 'path' names"),
    "pictures by another name": (
        {"messages": [{"role": "user", "content": "x"}], "answer": "y", "frame_files": ["1.jpg", "2.jpg"]},
        "but 'frame_files' names",
    ),
    "mistyped media": ({"question": "x", "answer": "y", "vidoe": "a.mp4"}, "did you mean 'video' by 'vidoe'"),
    "video of a wrong type": ({**NATIVE, "video": 3}, "video: expected the path"),
    "url": ({**NATIVE, "video": "https://example.org/a.mp4"}, "download it"),
    "one option": ({**NATIVE, "options": ["x"]}, "at least 2"),
    "options of a wrong type": ({**NATIVE, "options": "A or B"}, "options: expected a list"),
    "answer beyond the options": ({**NATIVE, "options": ["x", "y"], "answer": "C"}, "none of the options"),
    "more tags than files": (
        {**NATIVE, "question": "<video><video>x"},
        "2 <video> or <image> tags, but 1 files",
    ),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
    "no user turn": ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
    "answer first": ({"messages": [{"role": "assistant", "content": "x"}]}, "without a user turn"),
    "two questions": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "video": "a.mp4"},
        "two user turns",
    ),
    "history": ({"query": "x", "response": "y", "history": [["a", "b"]], "video": "a.mp4"}, "history"),
    "unknown speaker": ({"conversations": [{"from": "cat", "value": "x"}]}, "unknown 'from' 'cat'"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown part"),
    "metadata of a wrong type": ({**NATIVE, "metadata": 3}, "metadata: expected an object"),
    "data type": ({"problem": "x", "solution": "y", "path": "a.mp4", "data_type": "audio"}, "data_type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_named_with_its_line(name, write, media):
    row, message = WRONG[name]
    path = write(NATIVE, "", row, {**NATIVE, "id": "last"})
    with pytest.raises(UsageError) as caught:
        read_examples(path, media_root=media)
    assert str(caught.value).startswith(f"{path}: 1 of 3 rows are wrong\n  {path}:3: ")
    assert message in str(caught.value)
    report = read_report(path, media_root=media)
    assert (report.rows, len(report.examples), len(report.errors)) == (3, 2, 1)


def test_all_wrong_rows_are_counted_and_the_first_shown(write, media):
    path = write(*[{"video": "a.mp4", "question": f"{i}"} for i in range(25)], NATIVE)
    with pytest.raises(UsageError) as caught:
        read_examples(path, media_root=media)
    message = str(caught.value)
    assert "25 of 26 rows are wrong" in message and "and 15 more" in message
    assert f"{path}:10:" in message and f"{path}:11:" not in message


def test_skipping_leaves_wrong_rows_out_and_says_so(write, media, caplog):
    path = write(NATIVE, {"question": "x"}, {**NATIVE, "id": "z"})
    with caplog.at_level(logging.WARNING):
        examples = read_examples(path, media_root=media, on_error="skip")
    assert [example.id for example in examples] == ["data:1", "z"]
    assert "1 of 3 rows are wrong" in caplog.text and f"{path}:2" in caplog.text


@pytest.mark.parametrize("key", ["on_error", "scored"])
def test_a_value_that_is_not_known_is_refused(write, media, key):
    with pytest.raises(UsageError, match=f"{key}: expected .* or .*, got 'bogus'"):
        read_examples(write(NATIVE), media_root=media, **{key: "bogus"})


def test_a_file_without_a_usable_row_is_refused(write, media, tmp_path):
    with pytest.raises(UsageError, match="the file is empty"):
        read_examples(write(), media_root=media)
    with pytest.raises(UsageError, match=r"no usable row.*:1: "):
        read_examples(write({"question": "x"}), media_root=media, on_error="skip")
    with pytest.raises(UsageError, match="cannot read the dataset"):
        read_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError, match="cannot read the dataset"):
        read_examples(tmp_path)


def test_duplicate_ids(write, media):
    path = write({**NATIVE, "id": "x"}, {**NATIVE, "id": "x"})
    with pytest.raises(UsageError, match=r":2: id 'x' is that of line 1 too"):
        read_examples(path, media_root=media)
    row, _ = PUBLISHED["LLaVA, open"]  # such files name the video, not the question
    report = read_report(write(row, row), media_root=media)
    assert len({example.id for example in report.examples}) == 2 and not report.errors
    assert any("share their id" in note for note in report.notes)


def test_missing_categories_are_noted(write, media):
    report = read_report(write(NATIVE, {**NATIVE, "task_type": "Counting Problem"}), media_root=media)
    assert [example.category for example in report.examples] == ["all", "Counting Problem"]
    assert report.notes == ['1 questions have no category; they are reported under "all"']


def test_answers_and_files_may_be_left_unchecked(write, media):
    assert one(write, media, {"video": "a.mp4", "question": "x"}, require_answer=False).answer is None
    example = one(write, media, {**NATIVE, "video": "nowhere.mp4"}, check_files=False)
    assert example.videos == (str(media / "nowhere.mp4"),)
    absolute = str(media / "a.mp4")
    assert one(write, media / "elsewhere", {**NATIVE, "video": absolute}).videos == (absolute,)


def test_paths_start_from_the_file(media):
    path = media / "here.jsonl"
    path.write_text(json.dumps(NATIVE))
    assert read_examples(path)[0].videos == (str(media / "a.mp4"),)


def test_a_json_array_is_read_with_its_lines(tmp_path, media):
    rows = [PUBLISHED["Video-R1, choice"][0], {"problem": "x"}, {**NATIVE, "id": "n"}]
    path = tmp_path / "Video-R1-260k.json"
    path.write_text(json.dumps(rows, indent=2))
    report = read_report(path, media_root=media)
    assert len(report.examples) == 2 and report.formats == {"Video-R1": 1, "native": 1}
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text == "  {" and i > 2)
    assert report.errors == [f"{path}:{line}: no answer"]
    path.write_text(json.dumps(rows, indent=2)[:-40])
    assert "the rest is not read" in read_report(path, media_root=media).errors[-1]


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma"])
def test_a_packed_file_is_told_as_one(tmp_path, module):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(importlib.import_module(module).compress(b'{"question": "what?"}\n' * 9))
    with pytest.raises(UsageError, match=r"data\.jsonl\.gz: is packed by \w+; unpack it"):
        read_examples(path, on_error="skip")


def test_bytes_that_are_no_text(tmp_path, media):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(NATIVE).encode() + b'\n{"question": "\xff"}\n')
    report = read_report(path, media_root=media)
    assert len(report.examples) == 1 and report.errors == [f"{path}:2: not UTF-8 at byte 14"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["user", "A. x", "<video>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    [
        *FORMATS,
        "answer",
        "options",
        "video",
        "images",
        "completion",
        "solution",
        "path",
        "metadata",
        "role",
        "content",
    ]
)


@given(st.dictionaries(keys, json_values, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_row_is_converted_or_refused(row):
    try:
        _, found = convert(row)
    except RowError as error:
        assert str(error) and "\n" not in str(error)[:40]
    else:
        assert all(fields.question.strip() for fields in found)


# Chance


def example(question, answer, category="c", **metadata):
    return Example(question, question, answer, category=category, metadata=metadata)


def test_chance_is_the_share_of_the_most_frequent_answer():
    rows = [example("q?", answer) for answer in ["a"] * 12 + ["b"] * 8] + [example("r?", "b")] * 20
    assert chance_by_category(rows) == {"c": pytest.approx((12 + 20) / 40)}
    assert chance_accuracy(rows) == pytest.approx(0.8)
    assert chance_by_category(rows, reference=[example("q?", "b")] * 20 + [example("r?", "b")] * 20) == {
        "c": pytest.approx((8 + 20) / 40)
    }


def test_chance_joins_rare_wordings():
    rows = [
        example(f"what does {name} do?", "it runs." if i % 4 else "it sits.")
        for i, name in enumerate("abcdefgh")
    ]
    assert chance_by_category(rows) == {"c": 0.75}


def test_chance_compares_facts():
    form = r"the (?:circle|square) is (red|blue)\."
    rows = [
        example(f"{shape}?", f"the {shape} is {color}.", form=form, kind="color")
        for shape, color in [("circle", "red"), ("square", "red"), ("circle", "blue")]
    ]
    assert chance_by_category(rows) == {"c": pytest.approx(2 / 3)}
    assert summarise(rows)[0].max_answer_words == 4


# The command


def test_check_prints_a_table(write, media, capsys):
    path = write(NATIVE, {**NATIVE, "id": "two", "category": "counting problem"})
    assert main(["check", str(path), "--media_root", str(media)]) == 0
    assert main(["check", str(path), "--media_root", str(media), "--shown", "-1"]) == 2
    out = capsys.readouterr().out
    assert "counting problem" in out and "2 questions, all good" in out and "note: 1 questions" in out


def test_check_names_wrong_rows_and_bad_files(write, media, capsys):
    path = write(NATIVE, {"question": "x"})
    assert main(["check", str(path), "--media_root", str(media)]) == 2
    assert f"{path}:2:" in capsys.readouterr().err
    bad = media / "bad.mp4"
    bad.write_bytes((media / "a.mp4").read_bytes()[:300])
    path = write(NATIVE, {**NATIVE, "video": "bad.mp4"})
    assert main(["check", str(path), "--media_root", str(media)]) == 1
    err = capsys.readouterr().err
    assert "1 of 2 files cannot be decoded" in err and f"{path}:2: {bad}" in err and "Traceback" not in err
    assert main(["check", str(path), "--media_root", str(media), "--skip_decode"]) == 0


def test_check_takes_a_folder_of_splits_and_tells_what_they_share(tmp_path, media, capsys):
    """As `train --data FOLDER` reads it: every wrong row of every split, and rows that training would leave out."""
    rows = {
        "sft": [{"image": "c.png", "question": "Which?", "answer": "red"}],
        "rl": [{**NATIVE, "video": "b.mp4"}, {"question": "Which?", "answer": "red"}],
        "validation": [{**NATIVE, "video": "b.mp4"}],
        "test": [{**NATIVE, "video": "b.mp4"}],
    }
    for split, lines in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["check", str(tmp_path), "--media_root", str(media)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "note: 1 rl rows are about media of validation or test; training leaves them out" in out
    assert "note: 1 validation rows are about media of test" in out and "sft rows are" not in out
    assert all(f"{tmp_path / split}.jsonl: {len(lines)} rows" in out for split, lines in rows.items())
    (tmp_path / "rl.jsonl").write_text(json.dumps(rows["test"][0]) + "\n")
    assert main(command) == 2
    assert "all 1 rl rows are about media of validation or test" in capsys.readouterr().err
    (tmp_path / "sft.jsonl").write_text('{"question": 1}\n')
    (tmp_path / "test.jsonl").write_text("")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "sft.jsonl:1: question: expected a text, got int" in err and "test.jsonl: no row" in err
    (tmp_path / "val.jsonl").write_text("")
    (tmp_path / "validation.jsonl").unlink()
    assert main(command) == 2
    assert "val.jsonl would not be read" in capsys.readouterr().err


def test_make_then_check_then_preview(tmp_path, capsys):
    out = tmp_path / "made"
    flags = [
        "--sft_clips",
        "4",
        "--rl_clips",
        "1",
        "--validation_clips",
        "1",
        "--test_clips",
        "2",
        "--seed",
        "5",
    ]
    assert main(["make", str(out), *flags]) == 0
    assert "8 clips" in capsys.readouterr().out
    assert main(["make", str(out), *flags]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["make", str(out), "--seed", "6"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main(["check", str(out / "test.jsonl")]) == 0
    assert main(["preview", str(out / "test.jsonl"), str(tmp_path / "sheet.png"), "--clips", "2"]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_usage_of_the_command(tmp_path, capsys):
    assert main(["make", str(tmp_path / "x"), "--sft_clpis", "3"]) == 2
    assert "did you mean 'sft_clips'" in capsys.readouterr().err
    assert main(["make"]) == 2
    assert main(["make", str(tmp_path / "x"), "--label_noise", "2"]) == 2
    assert main(["check", str(tmp_path / "none.jsonl")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    for wrong in (["chekc"], ["check"], ["check", "x", "--shwon", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_a_file_of_rows_is_read_line_by_line(tmp_path):
    """A run's rollouts, which `replay` and `rank` read, may be several gigabytes."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'\n{"question": "%s"}' % (b"a" * 2**20) * 24 + b"\n")
    tracemalloc.start()
    numbers = [number for number, _ in rows_of(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers == list(range(2, 26))
    assert peak < 8 * 2**20 < path.stat().st_size / 2


def test_half_of_a_character_is_looked_for_at_the_speed_of_the_decoder(tmp_path):
    """Looked for character by character it cost more than all the rest of reading."""
    path = tmp_path / "rows.jsonl"
    text = ("word " * 2**18 + "é") * 4
    path.write_text(json.dumps({"question": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    began = time.process_time()
    assert any("\ud800" <= character <= "\udfff" for character in text) is False
    alone = time.process_time() - began
    began = time.process_time()
    assert next(rows_of(path)) == (1, {"question": text})
    assert time.process_time() - began < alone / 2
