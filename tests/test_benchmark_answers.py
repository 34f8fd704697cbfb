"""Answering a published benchmark: what goes on, what is refused, what is asked again."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_parts import put, record, run

from rlaif_fast import evaluate
from rlaif_fast.data import VOCABULARY
from rlaif_fast.data.benchmarks import read_benchmark
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.answering import likeliest
from rlaif_fast.evals.command import settings_of
from rlaif_fast.evals.identity import asked_digest, model_digest
from rlaif_fast.evals.options import EvaluateConfig, configuration
from rlaif_fast.evals.records import EvalFolder, Record, read_records
from rlaif_fast.policy.tiny import make_tiny, words_of
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import Manifest, digests, write_manifest
from rlaif_fast.trainer.datasets import read_file
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.video.refs import Cut, MediaRef

pytest_plugins = ("benchmark_parts",)


def test_an_evaluation_counts_what_cannot_be_seen_and_goes_on(videomme, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(videomme, model, out) == 0
    said = capsys.readouterr().out
    assert "question 2-1 is unanswered and counts as wrong: " in said and "duration" in said
    records = {record.id: record for record in read_records(out / "items.jsonl")}
    assert len(records) == 8
    assert [records[f"{n}-1"].prediction is None for n in range(4)] == [False, False, True, True]
    assert "bad.mp4: not a readable video: " in records["2-1"].trouble and "gone" in records["3-1"].trouble
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert rows[0]["n"] == "8" and rows[0]["unanswered"] == "4"
    assert float(rows[0]["accuracy"]) == sum(record.correct for record in records.values()) / 8
    assert (out / "accuracy.png").stat().st_size > 5000
    # Cut off in the middle of a line, it answers what is missing, alike.
    whole = (out / "items.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "items.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert run(videomme, model, out) == 0
    assert sorted((out / "items.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    # Other settings do not go into the same folder.
    assert run(videomme, model, out, "--answering=letter", "--short=false") == 2
    assert "other answering" in capsys.readouterr().err
    # Nor do answers to what the files asked before.
    rows = json.loads((videomme / "test-0.json").read_text())
    put(videomme / "test-0.json", [rows[0] | {"answer": "D"}, *rows[1:]])
    assert run(videomme, model, out) == 2
    assert "an answer to '0-1' that was asked 'How many candles are on the tree?' (right: 'A')" in (
        capsys.readouterr().err
    )


def test_two_evaluations_do_not_write_into_one_folder_at_once(videomme, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(videomme, model, out, "--limit=2") == 0
    before = (out / "items.jsonl").read_bytes()
    with RunDir(out).lock():  # as the other one holds it
        assert run(videomme, model, out) == 2
    assert f"output_dir {out} is in use by a run that still goes on" in capsys.readouterr().err
    assert (out / "items.jsonl").read_bytes() == before
    assert run(videomme, model, out) == 0


def test_other_weights_do_not_go_into_the_same_folder(videomme, model, tmp_path, capsys):
    own = shutil.copytree(model, tmp_path / "own")
    assert run(videomme, own, tmp_path / "out", "--limit=2") == 0
    before = (tmp_path / "out/items.jsonl").read_bytes()
    words = set(VOCABULARY) | set(words_of(("A B C D . one two man who is driving ? ball",)))
    other = make_tiny(tmp_path / "other", words, seed=4)
    shutil.copy(other / "model.safetensors", own / "model.safetensors")
    capsys.readouterr()
    assert run(videomme, own, tmp_path / "out", "--limit=2") == 2
    assert "holds an evaluation with other weights; give another folder" in capsys.readouterr().err
    assert (tmp_path / "out/items.jsonl").read_bytes() == before


def test_an_evaluation_that_ended_before_its_first_answer_may_begin_with_other_settings(
    videomme, model, tmp_path, capsys
):
    assert run(videomme, tmp_path / "misspelt", tmp_path / "out", "--limit=2") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert run(videomme, model, tmp_path / "out", "--limit=2") == 0
    assert len(read_records(tmp_path / "out/items.jsonl")) == 2


def test_answers_that_were_scored_otherwise_are_not_gone_on_with(videomme, model, tmp_path, capsys):
    """By an earlier version, that is; the first of them did not say how."""
    out = tmp_path / "out"
    assert run(videomme, model, out, "--limit=2") == 0
    settings = json.loads((out / "settings.json").read_text())
    for scoring in ({}, {"scoring": settings["scoring"] - 1}):
        earlier = {name: value for name, value in settings.items() if name != "scoring"} | scoring
        put(out / "settings.json", earlier)
        capsys.readouterr()
        assert run(videomme, model, out) == 2
        assert "holds an evaluation with other scoring; give another folder" in capsys.readouterr().err
    # Compared with, it is told.
    before = f"--before={out / 'items.jsonl'}"
    assert run(videomme, model, tmp_path / "other", "--limit=2", before) == 0
    assert "items.jsonl has other scoring, which is part of the change" in capsys.readouterr().err
    put(out / "settings.json", settings)
    assert run(videomme, model, tmp_path / "other", "--limit=2", before) == 0
    assert "part of the change" not in capsys.readouterr().err


def test_settings_are_all_that_an_answer_and_its_verdict_depend_on(model):
    """A resumed run can have other rules, and the same best checkpoint."""
    options = EvaluateConfig(benchmark="videomme", data="folder", model=model)
    config = configuration(options)
    before = settings_of(options, config)
    for change, name in (
        ({"oracle_options": {"tolerance": 0.1}}, "rules"),
        ({"oracle_options": {"extract": "Answer: (.*)"}}, "rules"),
        ({"system_prompt": "Be brief."}, "system_prompt"),
        ({"max_reasoning_tokens": 8}, "max_reasoning_tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
    ):
        after = settings_of(options, dataclasses.replace(config, **change))
        assert [key for key in after if after[key] != before[key]] == [name]
    unread = {"model": "other", "threshold": 0.5}  # of a judge in training
    assert settings_of(options, dataclasses.replace(config, oracle_options=unread)) == before
    # What could not be read in time is asked again where it has more.
    longer = dataclasses.replace(options, decode_timeout=900.0, decode_workers=8)
    assert (configuration(longer).decode_timeout, configuration(longer).decode_workers) == (900.0, 8)
    assert settings_of(longer, configuration(longer)) == before


def test_what_identifies_a_model(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    seen = {model_digest(str(model))}
    assert model_digest(str(own)) in seen
    write_manifest(own, Manifest(1, digests(own)))
    assert model_digest(str(own)) in seen
    (own / "chat_template.jinja").write_text("other")
    seen.add(model_digest(str(own)))
    put(own / "adapter_model.safetensors", "adapters")
    put(own / "adapter_config.json", {"base_model_name_or_path": str(model), "r": 4})
    seen.add(model_digest(str(own)))
    put(own / "adapter_config.json", {"base_model_name_or_path": "/nonexistent/base", "r": 4})
    seen.add(model_digest(str(own)))
    assert len(seen) == 4 and None not in seen
    assert model_digest("/nonexistent/base") is None


@pytest.mark.parametrize(
    "change",
    [
        {"options": ("One.", "Five.")},
        {"asked": "How many?\nA. One.\nB. Two."},
        {"media": (MediaRef("a.mp4", cut=Cut(video_end=2.0)),)},
        {"media": (MediaRef("b.mp4"),)},
        {"system": "Be brief."},
    ],
)
def test_answers_to_other_options_media_or_cuts_are_refused(change, tmp_path):
    example = Example("x", "How many?", "A", options=("One.", "Two."), media=(MediaRef("a.mp4"),))
    folder = EvalFolder.open(tmp_path / "out", {})
    asked = asked_digest(example)
    folder.add([Record("x", "a.mp4", {}, "How many?", "A", "A", True, asked=asked)])
    folder.refuse_other_questions([example])
    with pytest.raises(UsageError, match="'x' that was asked 'How many\\?' with other options, media, cuts"):
        folder.refuse_other_questions([dataclasses.replace(example, **change)])


def test_what_could_not_be_asked_is_asked_again(videomme, model, tmp_path, video, capsys):
    assert run(videomme, model, tmp_path / "out") == 0
    video("bench/data/bad.mp4")
    video("bench/data/gone.mp4")
    assert run(videomme, model, tmp_path / "out") == 0
    assert all(record.prediction is not None for record in read_records(tmp_path / "out/items.jsonl"))
    assert len(read_records(tmp_path / "out/items.jsonl")) == 8
    put(videomme / "data/one.mp4", "other\n")
    assert run(videomme, model, tmp_path / "out") == 2
    assert "'0-1' that was asked" in capsys.readouterr().err


def test_nothing_that_can_be_answered_is_an_error(videomme, model, tmp_path, capsys):
    for name in ("one", "two"):
        put(videomme / f"data/{name}.mp4", "no video\n")
    assert run(videomme, model, tmp_path / "out") == 2
    assert "none of the 8 questions could be answered" in capsys.readouterr().err
    shutil.rmtree(videomme / "data")
    assert run(videomme, model, tmp_path / "new") == 2
    assert "none of the 8 questions can be asked: no video 'one'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge=reference"], "judge: it grades open questions"),
        (["--answering=letter"], "max_completion_length: not read where answering is letter"),
        (["--before=BEFORE"], "before: it holds 1 questions, 0 of them"),
    ],
)
def test_what_no_question_reads_is_refused(videomme, tmp_path, words, said, capsys):
    EvalFolder.open(tmp_path / "before", {}).add([record(1, "v", True)])
    words = [word.replace("BEFORE", str(tmp_path / "before/items.jsonl")) for word in words]
    assert run(videomme, "no model", tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_choices_alone_have_another_way_to_be_answered(tmp_path, video, capsys):
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7}
    put(tmp_path / "test_qa.json", [row])
    video("video7.mp4")
    words = ["--benchmark=msrvtt_qa", f"--data={tmp_path}", "--model=m", "--answering=letter"]
    assert evaluate.main(words) == 2
    assert "answering: it is of multiple choice" in capsys.readouterr().err


def test_two_processes_answer_as_one_does(videomme, model, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        assert (
            run(
                videomme,
                model,
                tmp_path / out,
                f"--num_processes={processes}",
                "--answering=letter",
                "--short=false",
            )
            == 0
        )
    first, second = (
        sorted((tmp_path / out / "items.jsonl").read_text().splitlines()) for out in ("one", "two")
    )
    assert first == second


def test_letters_and_likelihoods_are_the_most_likely(videomme, model, tmp_path):
    """Against a plain forward pass of the model for every option."""
    from rlaif_fast.evals.options import EvaluateConfig, configuration, load_checkpoint
    from rlaif_fast.trainer import setup

    options = EvaluateConfig(benchmark="videomme", data=str(videomme), model=model, fps=4.0)
    config = configuration(options)
    loaded = load_checkpoint(config)
    policy = setup.make_policy(loaded, config)
    items = [item for item in read_benchmark("videomme", videomme) if not item.trouble][:4]
    with torch.no_grad(), setup.make_batch_maker(loaded, config) as make_batch:
        prompts = make_batch([item.example for item in items])
        candidates = [
            ["red ball", "two", "a man is driving"],
            ["A", "B"],
            ["ball", "one two", "who"],
            ["two", "two"],
        ]
        places = likeliest(policy, make_batch.encoder, prompts, candidates)
        for prompt, texts, place in zip(prompts, candidates, places):
            means = []
            for text in texts:
                ids = make_batch.encoder.encode_answer(text)[:-1]
                logps = policy.response_logps([prompt], torch.tensor([ids]), torch.tensor([len(ids)]))
                means.append(logps.double().mean().item())
            assert place == int(np.argmax(np.round(means, 5)))
    assert places[3] == 0  # the first of equal ones


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--benchmark=videomme", "--model=m"], "--data FOLDER"),
        (["--benchmark=videomme", "--model=m", "--data=d", "--output=o"], "leave output out"),
        (["--benchmark=videomme", "--model=m", "--data=d", "--answering=guess"], "answering"),
        (["--benchmark=videomme", "--model=m", "--data=d", "--limit=0"], "limit"),
        (["--benchmark=videomme", "--model=m", "--data=d", '--judge_options={"a": 1}'], "there is no judge"),
        (
            ["--benchmark=videomme", "--model=m", "--data=d", "--media_root=x"],
            "media_root: a benchmark's media",
        ),
        (
            ["--benchmark=videomme", "--model=m", "--data=d", "--videos_per_step=0"],
            "videos_per_step: expected 1",
        ),
        (
            ["--benchmark=videomme", "--model=m", "--data=d", "--output_dir="],
            "output_dir: expected a name, got ''",
        ),
        (["--model=m", "--data=d", "--videos_per_step=-1"], "videos_per_step: expected 1 or more, got -1"),
        (["--model=m", "--data=d", "--output="], "output: expected a name, got ''"),
        (
            ["--model=m", "--data=d", "--output=/nonexistent/p.jsonl"],
            "output: the folder /nonexistent does not",
        ),
        (["--model=m", "--data=d", "--output=/"], "output: / is a folder"),
        (["--model=m", "--data=d", "--subtitles=true"], "subtitles: only a benchmark"),
        (["--model=m", "--data=d", "--limit=5"], "limit: only a benchmark"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, said, capsys):
    assert evaluate.main(words) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path):
    put(tmp_path / "out/notes.txt", "mine")
    with pytest.raises(UsageError, match="holds no evaluation"):
        EvalFolder.open(tmp_path / "out", {})
    put(tmp_path / "items.jsonl", '{"id": 1}\n')
    with pytest.raises(UsageError, match=r"is not the items\.jsonl"):
        read_records(tmp_path / "items.jsonl")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]\n"])
def test_damaged_settings_are_refused_by_name(tmp_path, content):
    out = EvalFolder.open(tmp_path / "out", {"model": "m"})
    (out.path / "settings.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"settings\.json is damaged"):
        EvalFolder.open(out.path, {"model": "m"})
    put(tmp_path / "file", "x")
    with pytest.raises(UsageError, match="file is a file; give a folder"):
        EvalFolder.open(tmp_path / "file", {})


@pytest.mark.parametrize(
    "content", [b"{\n", b"\xff\xfe\n", b"[]\n", b"\xff\n{", b'{"id": 1, "video": "", "groups": {}}\n']
)
def test_damaged_records_are_refused_by_name_and_kept(tmp_path, content):
    out = EvalFolder.open(tmp_path / "out", {})
    out.add([record(1, "v", True)])
    content = out.items.read_bytes() + content
    out.items.write_bytes(content)
    with pytest.raises(UsageError, match=r"items\.jsonl is not the items\.jsonl of an evaluation"):
        EvalFolder.open(out.path, {})
    with pytest.raises(UsageError, match=r"items\.jsonl is not the items\.jsonl of an evaluation"):
        read_records(out.items)
    assert out.items.read_bytes() == content
    row = dataclasses.asdict(record(1, "v", True)) | {"correct": "yes"}
    with pytest.raises(UsageError, match="'1' is of another type"):
        read_records(put(tmp_path / "typed.jsonl", json.dumps(row) + "\n"))


def test_checkpoints_can_be_chosen_by_a_benchmark(videomme):
    name = Path(f"videomme:{videomme}")
    with pytest.raises(UsageError, match="2 of 8 questions: no video 'gone'"):
        read_file(name, TrainConfig())
    rows = read_file(name, TrainConfig(on_bad_row="skip"))
    assert [row.id for row in rows] == ["0-1", "0-2", "1-1", "1-2", "2-1", "2-2"]
    assert all(row.asked and row.asked.endswith("The best answer is:") for row in rows)
