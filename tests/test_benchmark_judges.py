"""Judges of open answers in an evaluation, over a real HTTP server."""

from __future__ import annotations

import dataclasses
import json

import pytest
from benchmark_parts import put, request, run

from rlaif_fast import evaluate
from rlaif_fast.data import VOCABULARY
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.grading import RankingGrader, grade_answers, make_grader
from rlaif_fast.evals.records import read_records
from rlaif_fast.oracle.grading import Grade, parse_grade
from rlaif_fast.oracle.protocols import MalformedVerdict
from rlaif_fast.policy.tiny import make_tiny, words_of

pytest_plugins = ("benchmark_parts",)


def test_a_judge_grades_answers_over_http(judge):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    grader = make_grader("api", {"model": "m", "base_url": url, "max_attempts": 1})
    grades = grader.grade([request("a man"), request("a dog"), request("nonsense")])
    assert grades == [Grade(True, 4), Grade(False, 1), None]
    assert all("image" not in json.dumps(body) for body in judge.seen)


def test_reasoning_is_no_part_of_what_is_graded(judge):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    options = {"model": "m", "base_url": url}
    row = Example("x", "who is driving ?", "man")
    said = ["a man or a dog ? </think> a dog", "<answer>a man</answer>", "final: man is what I say; dog"]
    for extract, expected in ((None, [False, True, True]), (r"; (.*)", [False, True, False])):
        grader = make_grader("api", options | ({} if extract is None else {"extract": extract}))
        grades = grade_answers(grader, [(row, text) for text in said])
        assert [grade.correct for grade in grades] == expected
    shown = [body["messages"][1]["content"][-1]["text"] for body in judge.seen]
    assert not any("think" in text for text in shown)
    with pytest.raises(UsageError, match="judge_options: 'protocol' is of rankings, not of grades"):
        make_grader("api", options | {"protocol": "pairwise"})


@pytest.mark.parametrize(
    "said", ["", " \n", "<think>a man", "<answer>a man</answer><answer>a dog</answer>", "a man </think>"]
)
def test_an_answer_that_says_nothing_is_wrong_and_no_judge_is_asked(judge, said):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    row = Example("x", "who is driving ?", "man")
    for grader in (make_grader("api", {"model": "m", "base_url": url}), make_grader("reference", {})):
        grades = grade_answers(grader, [(row, "man"), (row, said), (row, "a </think> man")])
        assert [grade.correct for grade in grades] == [True, False, True]
        assert grades[1] == Grade(False, 0)
    assert len(judge.seen) == 2


def test_any_oracle_grades_by_ranking():
    grader = make_grader("reference", {})
    grades = grader.grade([request("man"), request("dog"), request("x", None)])
    assert isinstance(grader, RankingGrader)
    assert grades == [Grade(True, 5), Grade(False, 0), None]


@pytest.mark.parametrize(
    "reply",
    [
        '{"pred": "Yes", "score": 3}',
        '{"pred": "yes"}',
        '{"pred": "yes", "score": 6}',
        '{"pred": "no", "score": 1.5}',
        "yes",
        '{"pred": "yes", "score": true}',
        "{'pred': 'yes', 'score': 4}",
    ],
)
def test_a_grade_is_what_was_declared_or_nothing(reply):
    assert parse_grade('```json\n{"pred": "no", "score": 0}\n```') == Grade(False, 0)
    with pytest.raises(MalformedVerdict):
        parse_grade(reply)


def test_open_answers_are_graded_in_an_evaluation(judge, model, tmp_path, video):
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7010}
    put(tmp_path / "msrvtt/test_qa.json", [row, row | {"id": 2, "video_id": 9}])
    video("msrvtt/video7010.mp4")
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    words = [
        f"--data={tmp_path / 'msrvtt'}",
        f"--model={model}",
        f"--output_dir={tmp_path / 'out'}",
        "--fps=4",
    ]
    words += ["--judge=api", "--judge_options", json.dumps({"model": "m", "base_url": url})]
    assert evaluate.main(["--benchmark=msrvtt_qa", *words]) == 0
    answered, missing = read_records(tmp_path / "out/items.jsonl")
    assert answered.score in (1, 4) and answered.pred == (answered.score == 4) and missing.pred is None
    assert len(judge.seen) == 1
    # What could not be asked is wrong for the judge too.
    whole = json.loads((tmp_path / "out/summary.json").read_text())["table"][0]
    assert (whole["n"], whole["unanswered"], whole["judged"]) == (2, 1, 1)
    assert whole["judge_score"] == answered.score / 2 and whole["judge_accuracy"] == answered.pred / 2


def test_reasoning_that_does_not_end_is_no_answer(tmp_path, videomme, video, judge):
    """Of a model whose template opens it: a right word in it was counted. A letter that is chosen closes nothing.

    Neither is it one for a judge.
    """
    words = set(VOCABULARY) | set(words_of(("A B C D . one two man who is driving ? ball <think> </think>",)))
    thinker = make_tiny(tmp_path / "thinker", words, seed=3)
    template = thinker / "chat_template.jinja"
    text = template.read_text()
    start = "<|im_start|>assistant\n"
    assert text.count(start) == 1
    template.write_text(text.replace(start, start + "<think>\n"))
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7010}
    video("msrvtt/video7010.mp4")
    options = {"model": "m", "base_url": f"http://127.0.0.1:{judge.server_address[1]}/v1"}
    for turn, out in enumerate(("first", "again", "judged", "told where")):
        put(tmp_path / "msrvtt/test_qa.json", [row])
        words = ["--benchmark=msrvtt_qa", f"--data={tmp_path / 'msrvtt'}", f"--model={thinker}", "--fps=4"]
        if turn >= 2:
            own = options if turn == 2 else options | {"extract": "(.*)"}
            words += ["--judge=api", "--judge_options", json.dumps(own)]
        assert evaluate.main([*words, f"--output_dir={tmp_path / out}", "--max_completion_length=4"]) == 0
        [record] = read_records(tmp_path / out / "items.jsonl")
        assert "</think>" not in record.prediction and not record.correct, turn
        if turn >= 2:
            assert (record.pred, record.score, len(judge.seen)) == (turn == 3, 4 * (turn == 3), turn - 2)
        word = record.prediction if turn == 0 else record.prediction.split()[0]
        row |= {"answer": word}  # what it says on the way
    assert run(videomme, thinker, tmp_path / "letters", "--answering=letter", "--short=false") == 0
    records = read_records(tmp_path / "letters/items.jsonl")
    assert any(record.correct for record in records)
    assert all(record.correct == (record.prediction == record.answer) for record in records)


def test_grades_that_a_judge_did_not_give_are_told_and_asked_for_again(judge, model, tmp_path, video, capsys):
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7010}
    put(tmp_path / "msrvtt/test_qa.json", [row, row | {"id": 2}])
    video("msrvtt/video7010.mp4")
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    words = [f"--data={tmp_path / 'msrvtt'}", f"--model={model}", f"--output_dir={tmp_path / 'out'}"]
    words += ["--benchmark=msrvtt_qa", "--fps=4", "--max_completion_length=4", "--judge=api"]
    words += ["--judge_options", json.dumps({"model": "m", "base_url": url, "max_attempts": 1})]
    judge.down = True
    assert evaluate.main(words) == 1
    said = capsys.readouterr()
    assert "not graded by the judge: 2 answers" in said.out
    assert "judge: api graded none of 2 answers; they are kept" in said.err
    before = read_records(tmp_path / "out/items.jsonl")
    judge.down = False
    assert evaluate.main(words) == 0
    after = read_records(tmp_path / "out/items.jsonl")
    assert all(record.pred is not None and record.score in (1, 4) for record in after)
    assert [dataclasses.replace(record, pred=None, score=None) for record in after] == before
    assert "not graded" not in capsys.readouterr().out
