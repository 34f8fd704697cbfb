"""Columns and files as published datasets ship them, and answers with reasoning around them."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from rlaif_fast.data import read_examples, read_report
from rlaif_fast.errors import UsageError
from rlaif_fast.video.refs import Cut


@pytest.fixture
def folder(tmp_path):
    for name in (
        "a.mp4",
        "4010069381.mp4",
        "v_abc.mp4",
        "videos/fFjv93ACGo8.mp4",
        "video7010.mp4",
        "vid1451.avi",
        "c.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def read(folder, *rows, **options):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, **options)


BLUE = {"question": "color?", "video": "a.mp4", "options": ["red", "blue"]}
ANSWERS = [
    ({**BLUE, "answer": "(B) blue"}, "B"),
    ({**BLUE, "answer": "B. blue"}, "B"),
    ({**BLUE, "answer": "B) Blue."}, "B"),
    ({**BLUE, "answer": "blue"}, "B"),
    ({**BLUE, "options": {"A": "red", "B": "blue"}, "answer": "B"}, "B"),
    ({**BLUE, "options": {"B": "blue", "A": "red"}, "answer": "blue"}, "B"),
    ({**BLUE, "options": {"0": "red", "1": "blue"}, "answer": "blue"}, "B"),
    ({**BLUE, "options": {"a": "red", "b": "blue"}, "answer": "(B) blue"}, "B"),
    ({**BLUE, "solution": "<answer>B</answer>"}, "B"),
    ({**BLUE, "solution": "B"}, "B"),
    ({**BLUE, "reward_model": {"style": "rule", "ground_truth": "B"}}, "B"),
    (
        {
            "prompt": [{"role": "user", "content": "<video>how many?"}],
            "videos": ["a.mp4"],
            "reward_model": {"ground_truth": 3},
        },
        "3",
    ),
    ({"query": "<video>how many?", "response": "three", "videos": ["a.mp4"]}, "three"),
    ({"question": "what is two plus two?", "answer": "4"}, "4"),
    ({**BLUE, "answer": "(B)blue"}, None),
    ({**BLUE, "answer": "(A) blue"}, None),
    ({**BLUE, "options": {"x": "red", "y": "blue"}, "answer": "B"}, None),
    ({**BLUE, "answer": "green"}, None),
]


@pytest.mark.parametrize(("row", "answer"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers_and_options_in_every_column(folder, row, answer):
    if answer is None:
        with pytest.raises(UsageError, match=r"data\.jsonl:1: (answer|options)"):
            read(folder, row)
    else:
        [example] = read(folder, row)
        assert example.answer == answer
        assert example.options in ((), ("red", "blue"))


REASONED = [
    (
        {"answer": "<think>it is</think><answer>blue</answer>"},
        "blue",
        "<think>it is</think><answer>blue</answer>",
    ),
    ({"answer": "<answer>blue</answer>"}, "blue", "<answer>blue</answer>"),
    ({"answer": "<think>it is</think> blue"}, "blue", "<think>it is</think> blue"),
    ({"answer": "<think>a <answer>red</answer>?</think><answer> blue </answer>"}, "blue", None),
    ({"answer": "<think>it goes into <answer> tags</think><answer>blue</answer>"}, "blue", None),
    ({"answer": "<think>a <answer>red</answer>?</think>\nblue"}, "blue", None),
    ({"answer": "<think>so <answer>blue</answer></think>"}, "blue", None),
    (
        {"process": "<think>it is</think>", "solution": "<answer>blue</answer>"},
        "blue",
        "<think>it is</think>\n<answer>blue</answer>",
    ),
    ({"process": "", "solution": "<answer>blue</answer>"}, "blue", "<answer>blue</answer>"),
    ({"answer": "blue"}, "blue", "blue"),
]


@pytest.mark.parametrize(("keys", "scored", "taught"), REASONED, ids=range(len(REASONED)))
def test_reasoning_is_taught_and_the_answer_scored(folder, keys, scored, taught):
    question = "problem" if "process" in keys else "question"
    row = {question: "color?", "video": "a.mp4", **keys}
    [example] = read(folder, row)
    assert example.answer == scored
    assert example.taught == (taught or keys["answer"])
    [whole] = read(folder, row, scored="whole")
    assert whole.answer == whole.taught == example.taught


PUBLISHED = {
    "NExT-QA": (
        {
            "video": "4010069381.mp4",
            "frame_count": 369,
            "width": 640,
            "height": 480,
            "question": "how do the two men play",
            "answer": 0,
        }
        | {
            "qid": 6,
            "type": "CH",
            "a0": "roll the handle",
            "a1": "tap their feet",
            "a2": "strum the string",
            "a3": "hit",
            "a4": "pat",
        },
        ("4010069381.mp4", "A", 5),
    ),
    "NExT-QA, CSV names": (
        {
            "video": "4010069381.mp4",
            "question": "why",
            "answer": "4",
            "qid": "1",
            "type": "CW",
            **{f"a{i}": f"because {i}" for i in range(5)},
        },
        ("4010069381.mp4", "E", 5),
    ),
    "Video-MME": (
        {
            "video_id": "001",
            "duration": "short",
            "domain": "Knowledge",
            "sub_category": "Humanity",
            "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        }
        | {
            "videoID": "fFjv93ACGo8",
            "question_id": "001-1",
            "task_type": "Counting Problem",
            "question": "how many?",
        }
        | {
            "options": [
                "A. Apples.",
                "B. Candles.",
                "C. Berries.",
                "D. The three kinds are of the same number.",
            ],
            "answer": "C",
        },
        ("videos/fFjv93ACGo8.mp4", "C", 4),
    ),
    "ActivityNet-QA": (
        {
            "video_name": "abc",
            "question": "is the athlete wearing trousers",
            "question_id": "v_abc_3",
            "answer": "yes",
            "type": 3,
        },
        ("v_abc.mp4", "yes", 0),
    ),
    "MSRVTT-QA": (
        {
            "answer": "couch",
            "category_id": 14,
            "id": 158581,
            "question": "what are three people sitting on?",
            "video_id": 7010,
        },
        ("video7010.mp4", "couch", 0),
    ),
    "MSVD-QA": (
        {"answer": "someone", "id": 30933, "question": "who cuts it?", "video_id": 1451},
        ("vid1451.avi", "someone", 0),
    ),
    "Video-R1": (
        {
            "problem_id": 2,
            "problem": "what?",
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": ["A. x", "B. y"],
        }
        | {"process": "", "solution": "<answer>B</answer>", "path": "./a.mp4", "data_source": "CLEVRER"},
        ("a.mp4", "B", 2),
    ),
    "MVBench": (
        {"video": "a.mp4", "question": "What?", "candidates": ["Put.", "Took."], "answer": "Took."},
        ("a.mp4", "B", 2),
    ),
    "choices": (
        {"video": "a.mp4", "question": "What?", "choices": {"A": "Put.", "B": "Took."}, "answer": "A"},
        ("a.mp4", "A", 2),
    ),
    "LLaVA-Video-178K": (
        {
            "id": "1",
            "video": "a.mp4",
            "data_source": "0_30_s",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A man."},
            ],
        },
        ("a.mp4", "A man.", 0),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_read_as_they_ship(folder, name):
    row, (video, answer, options) = PUBLISHED[name]
    [example] = read(folder, row)
    assert example.videos == (str(folder / video),)
    assert (example.answer, len(example.options)) == (answer, options)


def test_msvd_videos_are_found_by_their_mapping(folder):
    """As the dataset ships: the rows number the videos, and the files bear YouTube's names."""
    (folder / "youtube_mapping.txt").write_text("mv89psg6zh4_33_46 vid1\nother vid1451\n")
    (folder / "YouTubeClips").mkdir()
    (folder / "YouTubeClips/mv89psg6zh4_33_46.avi").write_bytes(b"x")
    row = PUBLISHED["MSVD-QA"][0]
    mapped, numbered = read(folder, row | {"video_id": 1}, row | {"id": 2})
    assert mapped.videos == (str(folder / "YouTubeClips/mv89psg6zh4_33_46.avi"),)
    assert numbered.videos == (str(folder / "vid1451.avi"),)  # where the mapped one is not there


ROWS = [
    {"id": str(i), "question": f"what {i}?", "answer": "B", "video": "a.mp4", "options": ["x", "y"]}
    for i in range(3)
]


def as_csv(path, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "options": json.dumps(row["options"])} for row in ROWS)


def as_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_datasets(path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def as_parquet_folder(path):
    elsewhere = path.with_name("another disk")
    elsewhere.mkdir()
    path.mkdir()
    as_parquet(elsewhere / "train-00000-of-00001.parquet")
    (path / "data").symlink_to(elsewhere)


WRITERS = {
    "data.csv": as_csv,
    "data.tsv": lambda path: as_csv(path, "\t"),
    "data.parquet": as_parquet,
    "saved": as_datasets,
    "parquets": as_parquet_folder,
    "data.json": lambda path: path.write_text(json.dumps(ROWS)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(folder, name):
    WRITERS[name](folder / name)
    examples = read_examples(folder / name, media_root=folder)
    assert [(e.id, e.question, e.answer, e.options) for e in examples] == [
        (r["id"], r["question"], "B", ("x", "y")) for r in ROWS
    ]
    assert {e.videos for e in examples} == {(str(folder / "a.mp4"),)}


def test_what_a_row_of_a_table_sees_of_its_video(folder):
    (folder / "data.csv").write_text("video,question,answer,video_start,nframes\na.mp4,what?,5,1.5,4\n")
    [example] = read_examples(folder / "data.csv")
    assert example.seen[0].cut == Cut(video_start=1.5, nframes=4) and example.answer == "5"
    (folder / "data.csv").write_text("video,question,answer,video_start\na.mp4,what?,5,soon\n")
    with pytest.raises(UsageError, match="video_start: expected a number, got 'soon'"):
        read_examples(folder / "data.csv")


def test_a_placeholder_of_a_table_has_keys_that_are_null(folder):
    """Arrow gives every part of a message the keys of all parts."""
    datasets = pytest.importorskip("datasets")
    content = [{"type": "video"}, {"type": "text", "text": "what?"}]
    row = {"messages": [{"role": "user", "content": content}], "answer": "x", "videos": ["a.mp4"]}
    datasets.Dataset.from_list([row]).save_to_disk(str(folder / "saved"))
    [example] = read_examples(folder / "saved", media_root=folder)
    assert example.videos == (str(folder / "a.mp4"),) and example.question == "what?"


def test_a_missing_library_says_how_to_install_it(folder, monkeypatch):
    (folder / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(UsageError, match=r"rlaif-fast\[tables\]"):
        read_examples(folder / "data.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"no"),
        ("a.csv", b"a,b\n1\n"),
        ("a.csv", b"a,a\n1,2\n"),
        ("a.csv", b"\xff\xfe"),
        ("a.csv", b'a\n"x'),
    ],
)
def test_a_damaged_table_is_told(folder, name, content):
    pytest.importorskip("pyarrow")
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        read_examples(folder / name)


def test_questions_and_answers_in_two_files_are_joined(folder):
    questions = [
        {"video_name": "abc", "question": "is he running", "question_id": f"v_abc_{k}"} for k in (1, 2, 3)
    ]
    answers = [
        {"answer": "yes", "type": 3, "question_id": "v_abc_2"},
        {"answer": "no", "type": 3, "question_id": "v_abc_1"},
    ]
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))
    report = read_report(folder / "test_q.json")
    assert [example.answer for example in report.examples] == ["no", "yes"]
    assert report.rows == 3
    [problem] = report.errors
    assert "question_id 'v_abc_3' has no answer in test_a.json" in problem
    (folder / "test_a.json").write_text(json.dumps([*answers, answers[0]]))
    with pytest.raises(UsageError, match=r"test_a\.json:1: the question_id 'v_abc_2' stands twice"):
        read_report(folder / "test_q.json")
    (folder / "test_a.json").write_text(json.dumps([{"answer": "yes"}]))
    with pytest.raises(UsageError, match="expected an answer with a question_id"):
        read_report(folder / "test_q.json")


@pytest.mark.parametrize("name", ["video7019", "video7019.mp4"])
def test_a_video_is_found_by_name_in_the_folders_of_evaluation_packs(folder, name):
    question = {"video_name": name, "question": "what is a man on", "question_id": "158581"}
    (folder / "test_q.json").write_text(json.dumps([question]))
    (folder / "test_a.json").write_text(json.dumps([{"answer": "couch", "type": 3, "question_id": "158581"}]))
    video = folder / "videos/all/video7019.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"a video")
    [example] = read_examples(folder / "test_q.json")
    assert example.videos == (str(video),) and example.answer == "couch"


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "[]", "None", "nan", "true", "1.0", "007"])
def test_answers_of_a_table_stay_texts(tmp_path, text):
    cell = text.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'id,question,answer\n{"007"},"{cell}","{cell}"\n')
    [example] = read_examples(tmp_path / "a.csv")
    assert (example.id, example.question, example.answer) == ("007", text, text)
