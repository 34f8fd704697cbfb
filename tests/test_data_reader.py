"""Reading datasets: the formats in use, and rows that are wrong."""

import importlib
import json
import logging
import time
import tracemalloc
import unicodedata
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_rows import NATIVE, PUBLISHED, media_folder, one, write_rows

from rlaif_fast.data import read_examples, read_report
from rlaif_fast.data.converters import FORMATS, RowError, convert
from rlaif_fast.data.sources import rows_of
from rlaif_fast.errors import UsageError


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture
def write(tmp_path):
    return partial(write_rows, tmp_path)


@pytest.mark.parametrize(
    "answer,letter",
    [("B", "B"), ("(B)", "B"), ("B.", "B"), ("B. a cat", "B"), ("a cat", "B"), ("A CAT ", "B"), ("A", "A")],
)
def test_answers_of_choices_become_letters(write, media, answer, letter):
    row = {**NATIVE, "options": ["A) a dog", "B) a cat"], "answer": answer}
    example = one(write, media, row)
    assert (example.answer, example.options) == (letter, ("a dog", "a cat"))


def test_an_answer_is_its_option_however_its_accents_are_spelled(write, media):
    row = {**NATIVE, "options": ["th\u00e9", "caf\u00e9"], "answer": "cafe\u0301"}
    assert one(write, media, row).answer == "B"


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
    "answer that two options have": ({**NATIVE, "options": ["x", "X."], "answer": "x"}, "of several options"),
    "form with a full stop that the answer lacks": (
        {**NATIVE, "answer": "it is 7", "metadata": {"form": r"it is (\d)\."}},
        "metadata.form: the answer 'it is 7' does not match it",
    ),
    "form beside an answer too long to be scored": (
        {**NATIVE, "answer": "a" * 4001, "metadata": {"form": "a*"}},
        "does not match it",
    ),
    "form that is spelled with combining marks": (
        {**NATIVE, "answer": "cafe\u0301", "metadata": {"form": "cafe\u0301"}},
        "does not match it",
    ),
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
    assert report.notes == ["1 questions have no category"]


def test_a_media_root_that_no_path_starts_from_is_noted(write, media, tmp_path):
    whole = {**NATIVE, "category": "x", "video": str(media / NATIVE["video"])}
    report = read_report(write(whole), media_root=tmp_path / "none")
    assert not report.errors
    assert report.notes == [f"media_root ({tmp_path / 'none'}) is not read, since no path is relative"]
    relative = {**NATIVE, "category": "x", "id": "b"}
    assert read_report(write(whole, relative), media_root=media).notes == []
    assert read_report(write(whole)).notes == []


def test_keys_that_look_as_if_they_cut_a_video_are_noted(write, media):
    rows = [{**NATIVE, "category": "x", "id": key, key: 2} for key in ("start", "max_frame", "video_length")]
    text = {"question": "x", "answer": "y", "category": "x", "start": 2}
    report = read_report(write(*rows, text), media_root=media)
    assert report.notes == [
        f"1 rows about media have {key!r}, which is metadata alone; did you mean {meant!r}?"
        for key, meant in (("start", "video_start"), ("max_frame", "max_frames"))
    ]


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_file_whose_accents_are_spelled_in_another_way_is_named(write, tmp_path, there, asked):
    """As a folder that was packed on a Mac."""
    (tmp_path / unicodedata.normalize(there, "fußgänger.mp4")).write_bytes(b"x")
    row = {**NATIVE, "video": unicodedata.normalize(asked, "fußgänger.mp4")}
    with pytest.raises(UsageError, match=f"the same name in the Unicode form {there} does; rename the file"):
        read_examples(write(row), media_root=tmp_path)


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
