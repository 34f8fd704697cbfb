"""Whatever a benchmark's files hold is read or refused by name; no row of theirs is a stack trace."""

import json

import pytest
from benchmark_parts import VIDEOMME_ROW, put
from fuzzing import counts, fuzz
from hypothesis import strategies as st
from test_data_hostile import json_values, words

from rlaif_fast.data.benchmarks import BENCHMARKS, read_benchmark
from rlaif_fast.errors import UsageError

MVBENCH_ROW = {"video": "a.mp4", "question": "What?", "candidates": ["Put.", "Took."], "answer": "Put."}
NEXTQA_ROW = {
    "video": 7,
    "question": "why",
    "answer": 1,
    "qid": 3,
    "type": "CW",
    **{f"a{i}": f"x{i}" for i in range(5)},
}
OPEN_ROW = {"video_id": 12, "question": "who is driving?", "answer": "man", "id": 5}
ACTIVITYNET_ROW = {
    "video_name": "a",
    "question": "what is red",
    "answer": "ball",
    "type": 4,
    "question_id": "a_0",
}
FILES = {  # benchmark -> a table of its own layout, and a row of it
    "videomme": ("test-1.json", VIDEOMME_ROW),
    "msvd_qa": ("test_qa.json", OPEN_ROW),
    "msrvtt_qa": ("test_qa.json", OPEN_ROW | {"category_id": 3}),
    "activitynet_qa": ("my_test.json", ACTIVITYNET_ROW),
    "mvbench": ("json/action[1].json", MVBENCH_ROW | {"start": 0.5, "end": 2}),
    "jsonl": ("a.json", {"question": "who?", "answer": "man", "video": "a.mp4"}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cases", counts(150, 5_000))
def test_any_row_is_read_or_refused(tmp_path, name, cases):
    file, row = FILES[name]
    values = (
        words
        | json_values
        | st.sampled_from([[row], [1, 2], {"a": row}, "9" * 5000, "**", "[a", "/", "..", "\u00b2"])
    )
    keys = st.sampled_from([*row, "questions", "type", "start", "end", "question_id", "id"])
    read = 0

    def check(changes):
        nonlocal read
        put(tmp_path / file, "[" + json.dumps(row | changes) + "]")
        try:
            read += len(read_benchmark(name, tmp_path, subtitles=BENCHMARKS[name].subtitles))
        except UsageError as error:
            assert str(tmp_path) in str(error)

    fuzz(st.dictionaries(keys, values, max_size=3), check, cases, "rows")
    assert read > 0


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("videomme", {"questions": "two"}, "expected 'questions' to list objects"),
        ("videomme", {"options": ["A. One.", None]}, "expected 'options' to list the options"),
        ("videomme", {"questions": ["what?"]}, "expected 'questions' to list objects"),
        ("videomme", {"options": ["x"] * 703}, "expected 'options' to list the options"),
        ("mvbench", {"start": "0:05"}, "start: expected a number"),
        ("mvbench", {"start": 5.0}, "end: expected more than start"),
        ("mvbench", {"candidates": {"a": "Put.", "b": "Took."}}, "expected 'candidates' to list the options"),
        ("msvd_qa", {"answer": ["man"]}, "expected 'answer' to be a text"),
    ],
)
def test_what_is_of_a_wrong_kind_is_named(tmp_path, name, change, said):
    file, row = FILES[name]
    put(tmp_path / file, [row | change])
    with pytest.raises(UsageError, match=said) as told:
        read_benchmark(name, tmp_path)
    assert f"{tmp_path / file}:1: " in str(told.value)


def test_rows_on_one_line_are_told_apart(tmp_path):
    put(tmp_path / "json/action.json", [MVBENCH_ROW] * 3)
    items = read_benchmark("mvbench", tmp_path)
    assert [item.example.id for item in items] == ["action:1", "action:1, row 2", "action:1, row 3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[1]", "expected one JSON object"), (b"{", "not JSON"), (b"\xff", "not UTF-8 at byte 0")],
)
def test_a_damaged_mapping_is_named(tmp_path, content, said):
    columns = {key: [value] for key, value in NEXTQA_ROW.items()}
    put(
        tmp_path / "mc.csv",
        ",".join(columns) + "\n" + ",".join(str(value) for (value,) in columns.values()) + "\n",
    )
    assert read_benchmark("nextqa", tmp_path)[0].example.answer == "B"
    (tmp_path / "map_vid_vidorID.json").write_bytes(content)
    with pytest.raises(UsageError, match=rf"map_vid_vidorID\.json: {said}"):
        read_benchmark("nextqa", tmp_path)


@pytest.mark.parametrize("name", ["msvd_qa", "jsonl"])
def test_a_damaged_list_of_names_is_named(tmp_path, name):
    put(tmp_path / "test_qa.json", [OPEN_ROW])
    (tmp_path / "youtube_mapping.txt").write_bytes(b"abc vid12\n\xff")
    with pytest.raises(UsageError, match=r"youtube_mapping\.txt: not UTF-8 at byte 10"):
        read_benchmark(name, tmp_path)
