"""A model's answers in place of the reference ones."""

import json
from pathlib import Path

import pytest

from rlaif_fast import evaluate
from rlaif_fast.data import VOCABULARY, read_examples
from rlaif_fast.data.__main__ import main
from rlaif_fast.data.label import label
from rlaif_fast.policy.tiny import make_tiny
from rlaif_fast.video.testing import counter_frames, write_video


def lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"question": "What moves?", "video": "v/a.mp4", "category": "motion", "id": "one"},
    {"question": "What is red?", "videos": ["v/a.mp4"], "answer": "a ball"},
    {"question": "What else?", "video": "/data/b.mp4"},
]


def test_rows_get_the_predictions_as_answers(tmp_path, capsys):
    file = lines(tmp_path / "in/rl.jsonl", ROWS)
    said = [{"example_id": "one", "prediction": "a cat"}, {"example_id": "rl:2", "prediction": "a dog"}]
    said += [{"example_id": "rl:3", "prediction": " "}]
    predictions = lines(tmp_path / "p.jsonl", said)
    out = tmp_path / "out/labelled.jsonl"
    assert main(["label", str(file), str(out), "--predictions", str(predictions)]) == 0
    assert "2 rows, 1 without a prediction left out" in capsys.readouterr().out
    first, second = map(json.loads, out.read_text().splitlines())
    assert first == ROWS[0] | {"answer": "a cat", "video": "../in/v/a.mp4"}
    assert second == ROWS[1] | {"answer": "a dog", "videos": ["../in/v/a.mp4"]}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "what?", "video": "file://HERE/a.mp4"},
        {"question": "what?", "videos": ["file://a.mp4"]},
        {"question": "of <video>a.mp4</video>\nwhat?"},
        {"question": "what?", "videoID": "a"},
        {"question": "what?", "video_id": "video", "video": {"path": "a.mp4", "nframes": 4}},
    ],
    ids=lambda row: next(reversed(row)),
)
def test_media_are_found_from_another_folder_however_they_are_named(tmp_path, row):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in/a.mp4", counter_frames(8, 32, 32), codec="mpeg4")
    file = lines(tmp_path / "in/rl.jsonl", [json.loads(json.dumps(row).replace("HERE", f"{tmp_path}/in"))])
    predictions = lines(tmp_path / "p.jsonl", [{"example_id": "rl:1", "prediction": "a cat"}])
    label(file, predictions, tmp_path / "out/labelled.jsonl")
    (before,) = read_examples(file, require_answer=False)
    (after,) = read_examples(tmp_path / "out/labelled.jsonl")
    assert after.question == before.question and after.layout == before.layout
    (medium,), (same,) = before.seen, after.seen
    assert Path(same.path).samefile(medium.path) and same.cut == medium.cut


def test_paths_of_a_media_root_are_found_without_it(tmp_path):
    (tmp_path / "root").mkdir()
    write_video(tmp_path / "root/a.mp4", counter_frames(8, 32, 32), codec="mpeg4")
    file = lines(tmp_path / "in/rl.jsonl", [{"question": "what?", "video": "a.mp4"}])
    predictions = lines(tmp_path / "p.jsonl", [{"example_id": "rl:1", "prediction": "a cat"}])
    command = ["label", str(file), str(tmp_path / "out.jsonl"), "--predictions", str(predictions)]
    assert main([*command, "--media_root", str(tmp_path / "root")]) == 0
    (example,) = read_examples(tmp_path / "out.jsonl")
    assert Path(example.videos[0]).samefile(tmp_path / "root/a.mp4")


def test_a_prediction_that_was_cut_off_is_left_out(tmp_path, capsys):
    file = lines(tmp_path / "rl.jsonl", ROWS)
    said = [{"example_id": "one", "prediction": "a cat", "finished": True}]
    said += [{"example_id": "rl:2", "prediction": "a dog that", "finished": False}]
    predictions, out = lines(tmp_path / "p.jsonl", said), tmp_path / "out.jsonl"
    command = ["label", str(file), str(out), "--predictions", str(predictions)]
    assert main(command) == 0
    assert (
        "1 rows, 1 without a prediction left out, 1 whose prediction was cut off" in capsys.readouterr().out
    )
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == ["a cat"]
    lines(predictions, said[1:])
    assert main(command) == 2
    assert "raise max_completion_length" in capsys.readouterr().err


def test_a_form_that_the_prediction_does_not_match_is_left_out(tmp_path):
    form = r"it is (red|blue)\."
    row = {"question": "What color?", "video": "v/a.mp4", "answer": "it is red."}
    rows = [row | {"id": name, "metadata": {"kind": "color", "form": form}} for name in ("a", "b")]
    said = [{"example_id": "a", "prediction": "it is blue."}, {"example_id": "b", "prediction": "it it red"}]
    file, predictions = lines(tmp_path / "rl.jsonl", rows), lines(tmp_path / "p.jsonl", said)
    out = tmp_path / "labelled.jsonl"
    assert main(["label", str(file), str(out), "--predictions", str(predictions)]) == 0
    first, second = read_examples(out, check_files=False)
    assert (first.answer, dict(first.metadata)) == ("it is blue.", {"kind": "color", "form": form})
    assert (second.answer, dict(second.metadata)) == ("it it red", {"kind": "color"})


def test_rows_are_called_and_found_as_they_are_read(tmp_path):
    """Whatever key names the row, and where the path stands beside what is seen of it."""
    rows = [
        {"question": "What?", "question_id": 7, "video": {"path": "v/a.mp4", "video_start": 1.0}},
        {"question": "What?", "id": None, "sample_id": " s ", "videos": [{"video": "v/a.mp4"}]},
    ]
    file = lines(tmp_path / "in/rl.jsonl", rows)
    names = [example.id for example in read_examples(file, require_answer=False, check_files=False)]
    said = lines(tmp_path / "p.jsonl", [{"example_id": name, "prediction": name} for name in names])
    out = tmp_path / "out/labelled.jsonl"
    assert main(["label", str(file), str(out), "--predictions", str(said)]) == 0
    labelled = read_examples(out, check_files=False)
    assert [example.answer for example in labelled] == ["7", "s"]
    found = {Path(example.seen[0].path).resolve() for example in labelled}
    assert found == {(tmp_path / "in/v/a.mp4").resolve()} and labelled[0].seen[0].cut.video_start == 1.0


def test_a_prediction_that_names_no_option_is_left_out_and_a_letter_is_a_label(tmp_path, capsys):
    """The reader refuses the one, and would take the other for an option's text."""
    row = {"question": "Which?", "video": "v/a.mp4", "answer": "A"}
    rows = [
        row | {"options": ["red", "blue"]},
        row | {"options": ["red", "blue"]},
        row | {"options": ["C", "A", "B"]},
        row | {"a0": "red", "a1": "blue", "answer": 1},
        row | {"candidates": ["red", "blue"], "process": "It shows red."},
        row | {"options": ["red", "blue"]},
    ]
    texts = ["the green one", "blue.", "A", "B", "<think>hm</think><answer>(B) blue</answer>", "B. red"]
    said = [{"example_id": f"rl:{i}", "prediction": text} for i, text in enumerate(texts, 1)]
    file, predictions = lines(tmp_path / "rl.jsonl", rows), lines(tmp_path / "p.jsonl", said)
    out = tmp_path / "labelled.jsonl"
    assert main(["label", str(file), str(out), "--predictions", str(predictions)]) == 0
    assert "4 rows, 0 without a prediction left out, 2 whose prediction names none" in capsys.readouterr().out
    examples = read_examples(out, check_files=False)
    assert [example.answer for example in examples] == ["B", "A", "B", "B"]
    assert examples[1].options == ("C", "A", "B") and examples[3].target == texts[4]
    assert main(["label", str(lines(file, rows[:1])), str(out), "--predictions", str(predictions)]) == 2
    assert "no prediction that names an option of a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said", "words"),
    [
        (ROWS, [{"example_id": "other", "prediction": "x"}], "no prediction for a row"),
        (ROWS, [{"id": "one"}], "example_id, prediction"),
        (
            ROWS,
            [{"example_id": "one", "prediction": "x"}, {"example_id": "other", "prediction": "y"}],
            "1 of 2 predictions are of no row of",
        ),
        (
            ROWS,
            [{"example_id": "one", "prediction": "x"}, {"example_id": "one", "prediction": "y"}],
            "p.jsonl:2: 'one' has a prediction already",
        ),
        (ROWS[:1] * 2, [{"example_id": "one", "prediction": "x"}], "rl.jsonl:2: the id 'one' stands twice"),
        ([{"messages": []}], [{"example_id": "one", "prediction": "x"}], "the texts question"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, rows, said, words, capsys):
    file, predictions = lines(tmp_path / "rl.jsonl", rows), lines(tmp_path / "p.jsonl", said)
    assert main(["label", str(file), str(tmp_path / "o.jsonl"), "--predictions", str(predictions)]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("out", ["rl.jsonl", "../DIR/rl.jsonl", "soft.jsonl", "hard.jsonl", "p.jsonl"])
def test_what_is_read_is_not_written_over(tmp_path, out, capsys):
    file = lines(tmp_path / "rl.jsonl", ROWS)
    predictions = lines(tmp_path / "p.jsonl", [{"example_id": "one", "prediction": "a cat"}])
    (tmp_path / "soft.jsonl").symlink_to(file)
    (tmp_path / "hard.jsonl").hardlink_to(file)
    before = file.read_bytes(), predictions.read_bytes()
    path = tmp_path / out.replace("DIR", tmp_path.name)
    assert main(["label", str(file), str(path), "--predictions", str(predictions)]) == 2
    assert "would be lost; give another file" in capsys.readouterr().err
    assert (file.read_bytes(), predictions.read_bytes()) == before


def test_rows_without_answers_are_answered_and_labelled(tmp_path, capsys):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/a.mp4", counter_frames(8, 32, 32), codec="mpeg4")
    model = make_tiny(tmp_path / "tiny", set(VOCABULARY), seed=1)
    file = lines(tmp_path / "rl.jsonl", ROWS[:1])
    words = ["--model", str(model), "--data", str(file), "--max_completion_length", "4"]
    assert evaluate.main(words) == 2
    assert "no answer" in capsys.readouterr().err
    assert evaluate.main([*words, "--output", str(tmp_path / "p.jsonl")]) == 0
    out = tmp_path / "labelled.jsonl"
    [prediction] = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert prediction["finished"] is False  # untrained, it does not end in four tokens
    lines(tmp_path / "p.jsonl", [prediction | {"finished": True}])
    assert main(["label", str(file), str(out), "--predictions", str(tmp_path / "p.jsonl")]) == 0
    [example] = read_examples(out)
    assert example.answer == prediction["prediction"].strip() and prediction["correct"] is None
