"""Rows that say one thing in two places, or something that would change what is learned and has no place."""

from __future__ import annotations

import json

import pytest

from rlaif_fast.data import read_examples, read_report
from rlaif_fast.data.label import label
from rlaif_fast.errors import UsageError
from rlaif_fast.video.refs import Cut

ASK = {"video": "a.mp4", "question": "color?"}
CHOICES = {**ASK, "options": ["red", "blue"]}
USER = {"role": "user", "content": "color?"}
HUMAN = {"from": "human", "value": "color?"}
RED = {"role": "assistant", "content": "red"}
CHAT = {"video": "a.mp4", "messages": [USER, RED]}
TALK = {"video": "a.mp4", "messages": [USER, RED, {**USER, "content": "and now?"}]}
BLUE = {"role": "assistant", "content": "blue"}
WHOLE = {**TALK, "messages": [*TALK["messages"], BLUE]}


@pytest.fixture
def read(tmp_path):
    for name in ("a.mp4", "1.png", "2.png", "3.gif"):
        (tmp_path / name).write_bytes(b"x")

    def read(row, **options):
        (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
        return read_examples(tmp_path / "data.jsonl", **options)

    return read


@pytest.mark.parametrize(
    "row",
    [
        {"video": "a.mp4", "messages": [USER], "solution": "red"},  # ms-swift's GRPO
        {"video": "a.mp4", "query": "color?", "solution": "red"},
        {"video": "a.mp4", "conversations": [HUMAN], "solution": "red"},
        {**ASK, "answer": None, "solution": "red"},
        {"problem": "color?", "path": "a.mp4", "data_type": None, "solution": "red"},
        {**ASK, "answer": "", "solution": "red"},
        {"video": "a.mp4", "prompt": "color?", "completion": "red", "answer": ""},
        {**CHAT, "answer": ""},
        {**ASK, "answer": "red", "solution": "it glows, so it is not blue"},  # a derivation
        {**ASK, "answer": "red", "solution": "<think>warm</think><answer>Red.</answer>"},
    ],
)
def test_the_answer_is_found_wherever_a_row_has_it(read, row):
    [example] = read(row)
    assert example.answer == "red"


def test_an_answer_beside_the_turns_is_that_of_the_question_without_one(read):
    assert [one.answer for one in read({**TALK, "solution": "blue"})] == ["red", "blue"]
    assert [one.answer for one in read({**TALK, "answer": "blue"})] == ["red", "blue"]
    assert [one.answer for one in read({**WHOLE, "answer": "blue"})] == ["red", "blue"]


@pytest.mark.parametrize("solution", ["A", "red", "<answer>A</answer>", "<answer>red</answer>"])
def test_a_solution_that_is_the_answer_in_other_words_is_none_other(read, solution):
    assert read({**CHOICES, "answer": "(A) red", "solution": solution})[0].answer == "A"


def test_a_label_is_no_verdict_beside_an_answer(read):
    assert read({**ASK, "answer": "no", "label": False})[0].answer == "no"


REFUSED = {
    "another option": (
        {**CHOICES, "answer": "A", "solution": "<answer>B</answer>"},
        "not what `solution` says",
    ),
    "another text": ({**CHOICES, "answer": "A", "solution": "blue"}, "not what `solution` says"),
    "another block": (
        {**ASK, "answer": "red", "solution": "<answer>blue</answer>"},
        "not what `solution` says",
    ),
    "a label elsewhere": ({**ASK, "options": ["B. blue", "A. red"], "answer": "B"}, "labels another"),
    "a label of some": ({**ASK, "options": ["B. blue", "C. red"], "answer": "B"}, "labels another"),
    "an answer of many": ({**WHOLE, "answer": "green"}, "answer: the row asks 2 questions"),
    "options of many": ({**WHOLE, "options": ["red", "blue"]}, "options: the row asks 2 questions"),
    "a text of choices": ({**ASK, "choices": "['red', 'blue']", "answer": "B"}, "choices: expected a list"),
    "columns of choices": (
        {**ASK, "choices": {"text": ["a", "b"], "label": ["A", "B"]}},
        "choices: expected",
    ),
    "objects": ({**ASK, "candidates": [{"A": "a"}, {"B": "b"}]}, "candidates: expected a list"),
    "not wanted": (
        {"video": "a.mp4", "prompt": "color?", "completion": "no", "label": False},
        "label: false",
    ),
    "kto": ({**CHAT, "kto_tag": False}, "kto_tag: false"),
    "two systems": (
        {**CHAT, "messages": [{"role": "system", "content": s} for s in "ab"] + CHAT["messages"]},
        "two system turns",
    ),
    "another system": (
        {**CHAT, "system": "b", "messages": [{"role": "system", "content": "a"}, *CHAT["messages"]]},
        "not the row's `system`",
    ),
    "stills": ({"videos": ["1.png", "2.png"], "question": "color?"}, "videos: '1.png' is a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_itself_is_refused_by_name(read, name):
    row, reason = REFUSED[name]
    with pytest.raises(UsageError, match=reason):
        read(row, require_answer=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("loss", False), ("reasoning_content", "warm"), ("tool_calls", [{"name": "zoom"}])],
)
def test_a_key_of_a_turn_that_changes_what_is_learned_is_refused_by_name(read, key, value):
    rows = (
        {**CHAT, "messages": [USER, {**RED, key: value}]},
        {"video": "a.mp4", "conversations": [HUMAN, {"from": "gpt", "value": "red", key: value}]},
        {"video": "a.mp4", "prompt": [USER], "completion": [{**RED, key: value}]},
    )
    for row in rows:
        with pytest.raises(UsageError, match=f"{key}: of a turn it is not used"):
            read(row)


@pytest.mark.parametrize("keys", [{"weight": 1}, {"loss": True}, {"tool_calls": []}, {"name": "x"}])
def test_a_key_of_a_turn_that_changes_nothing_is_read_over(read, keys):
    [example] = read({**CHAT, "messages": [{**USER, "weight": 0}, {**RED, **keys}]})
    assert example.answer == "red"


def test_what_a_row_says_of_its_media_holds_for_a_path_in_a_tag(read):
    row = {"question": "<video>a.mp4</video>color?", "video_start": 3, "video_end": 5, "fps": 2}
    [medium] = read(row, require_answer=False)[0].seen
    assert medium.cut == Cut(video_start=3.0, video_end=5.0, fps=2.0)


def test_moving_pictures_are_videos(read):
    assert len(read({"videos": ["3.gif", "3.gif"], **ASK, "answer": "red"} | {"video": None})[0].videos) == 2


def test_a_labelled_row_keeps_no_solution_of_another_answer(read, tmp_path):
    read({**CHOICES, "id": "1", "solution": "<answer>A</answer>"})
    (tmp_path / "said.jsonl").write_text(json.dumps({"example_id": "1", "prediction": "B"}) + "\n")
    label(tmp_path / "data.jsonl", tmp_path / "said.jsonl", tmp_path / "out.jsonl")
    assert read_examples(tmp_path / "out.jsonl")[0].answer == "B"


@pytest.mark.parametrize("key", ["options", "choices"])
def test_letters_of_other_rows_of_a_table_are_no_options(tmp_path, key):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [{"A": "red", "B": "blue"}, {"A": "red", "B": "blue", "C": "green"}]
    rows = [{"question": "color?", "answer": letter, key: own} for letter, own in zip("BC", texts)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    examples = read_examples(tmp_path / "data.parquet")
    assert [(one.answer, len(one.options)) for one in examples] == [("B", 2), ("C", 3)]


def test_a_thought_without_a_solution_is_no_answer(read):
    row = {"video": "a.mp4", "problem": "color?", "process": "<think>warm</think>", "solution": ""}
    assert read(row, require_answer=False)[0].answer is None
    assert read({**row, "answer": " ", "solution": "red"})[0].answer == "red"


def test_options_that_look_labelled_are_named_by_their_place_or_text(read):
    row = {**ASK, "options": ["J. Adams", "B. Obama", "A. Lincoln"]}
    assert [read({**row, "answer": a})[0].answer for a in ("B", "C", "J. Adams", "A. Lincoln")] == list(
        "BCAC"
    )


@pytest.mark.parametrize("rest", ["garbage", '[{"question": "where?"}]', "]"])
def test_what_follows_a_json_array_is_told(tmp_path, rest):
    file = tmp_path / "data.json"
    file.write_text('[{"question": "what?"}]\n' + rest)
    report = read_report(file, require_answer=False)
    assert len(report.examples) == 1 and "the array ends and" in report.errors[0]


@pytest.mark.parametrize("key", ["question", "query"])
def test_rows_of_an_array_on_one_line_have_names_of_their_own(tmp_path, key):
    (tmp_path / "data.json").write_text(json.dumps([{key: f"what {i}?"} for i in range(4)]))
    examples = read_examples(tmp_path / "data.json", require_answer=False)
    assert [one.question for one in examples] == [f"what {i}?" for i in range(4)]
    assert len({one.id for one in examples}) == 4


@pytest.mark.parametrize("between", ["", " ", "\n", ",,", ", ,"])
def test_rows_of_an_array_are_parted_by_one_comma(tmp_path, between):
    row = json.dumps({"question": "q", "answer": "x"})
    (tmp_path / "a.json").write_text(f"[{row}{between}{row}]")
    report = read_report(tmp_path / "a.json")
    assert len(report.examples) == 1 and "the rest is not read" in report.errors[0]
    (tmp_path / "a.json").write_text(f"[\n{row}\n,\n{row},\n]\n")
    assert [example.source.rpartition(":")[2] for example in read_examples(tmp_path / "a.json")] == ["2", "4"]


@pytest.mark.parametrize(
    ("row", "answer", "options"),
    [
        ({"a0": "red", "a1": "blue", "a2": None, "answer": 1}, "B", ("red", "blue")),
        ({"a0": "red", "a1": None, "a2": "blue", "answer": 2}, "B", ("red", "blue")),
        ({"a0": "red", "a1": "blue", "options": None, "answer": 1}, "B", ("red", "blue")),
        ({"candidates": ["red", "blue"], "options": [], "answer": "blue"}, "B", ("red", "blue")),
        ({"answer": None, "reward_model": {"ground_truth": "blue"}}, "blue", ()),
    ],
)
def test_a_null_or_empty_key_hides_no_other_and_is_no_text(read, row, answer, options):
    [example] = read({**ASK, **row})
    assert (example.answer, example.options) == (answer, options)


def test_an_index_of_no_option_is_refused(read):
    with pytest.raises(UsageError, match=r"expected the index of an option \(0, 2\), got 1"):
        read({**ASK, "a0": "red", "a1": None, "a2": "blue", "answer": 1})


def test_a_row_in_two_formats_is_noted(tmp_path):
    rows = [
        {"question": "color?", "answer": "red", "category": "x", key: [USER]}
        for key in ("messages", "prompt")
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], rows[0] | {"messages": None}]))
    assert read_report(file).notes == [
        "2 rows have 'question' and 'messages'; only 'question' is read",
        "1 rows have 'question' and 'prompt'; only 'question' is read",
    ]
