"""Paths of a run: whole wherever it is resumed from, and each used for what it is about."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rlaif_fast.data.synthetic.encode import encode_video
from rlaif_fast.errors import UsageError
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.train import dump_config
from rlaif_fast.trainer import datasets
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import preflight
from rlaif_fast.trainer.resolved import resolved
from rlaif_fast.trainer.resume import resumed_config


@pytest.fixture
def published(tmp_path):
    """A published benchmark of one's own: a folder with rows and a video."""
    folder = tmp_path / "bm"
    folder.mkdir()
    encode_video(folder / "a.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    row = {"video": "a.mp4", "question": "what?", "answer": "<answer>a cat</answer>"}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_the_folder_of_a_benchmark_and_paths_of_an_oracle_are_made_whole(tmp_path, published, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    members = [{"name": "local", "model": "judge"}, {"name": "api", "model": "some/name"}]
    config = resolved(
        TrainConfig(
            validation_data="jsonl:bm",
            test_data="jsonl:nothing",
            cache_dir="cache",
            oracle="ensemble",
            oracle_options={"members": members, "cache": "verdicts.sqlite"},
        )
    )
    assert config.validation_data == f"jsonl:{published}"
    assert config.test_data == "jsonl:nothing"
    assert config.cache_dir == str(tmp_path / "cache")
    first, second = config.oracle_options["members"]
    assert (first["model"], second["model"]) == (str(tmp_path / "judge"), "some/name")
    assert config.oracle_options["cache"] == str(tmp_path / "verdicts.sqlite")
    assert resolved(TrainConfig(cache_dir="~/kept")).cache_dir == "~/kept"
    monkeypatch.chdir("/")
    assert resolved(config) == config
    assert len(datasets.read_file(Path(config.validation_data), config)) == 1


def test_a_benchmark_scores_answers_in_its_own_way(published):
    config = TrainConfig(scored_answer="whole")
    with pytest.raises(UsageError, match="scored_answer: expected answer with the benchmark mvbench:"):
        datasets.read_file(Path(f"mvbench:{published}"), config)
    assert len(datasets.read_file(Path(f"jsonl:{published}"), config)) == 1


def test_media_root_is_not_that_of_generated_clips(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    encode_video(elsewhere / "b.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    rows = tmp_path / "test.jsonl"
    rows.write_text(json.dumps({"video": "b.mp4", "question": "what?", "answer": "a cat"}) + "\n")
    sizes = {f"synthetic_{split}_clips": 1 for split in ("sft", "rl", "validation", "test")}
    config = TrainConfig(
        test_data=str(rows),
        media_root=str(elsewhere),
        cache_dir=str(tmp_path / "cache"),
        model="tiny",
        **sizes,
    )
    found = datasets.read_splits(config, workers=1, progress=None)
    assert found["test"][0].videos == (str(elsewhere / "b.mp4"),)
    generated = found["rl"][0].videos[0]
    assert generated.startswith(str(tmp_path / "cache")) and Path(generated).is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer_offload": True}, "optimizer_offload: expected false where the device is cpu"),
        ({"patchify_backend": "triton"}, "patchify_backend: triton cannot run here"),
        ({"seed": 1_732_692_658_000_000_000}, "seed: expected a number of 32 bits"),
    ],
)
def test_what_cannot_work_here_is_refused_before_the_run(monkeypatch, changes, words):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match=words):
        preflight(TrainConfig(device="cpu", num_processes=1, **changes))


def test_resume_refuses_what_is_not_read_any_more(tmp_path):
    run = RunDir.create(tmp_path / "run")
    config = resolved(TrainConfig(model="tiny", device="cpu", num_processes=1, output_dir=str(run.path)))
    run.config.write_text(dump_config(config))
    assert resumed_config(run, {"sft_learning_rate": 0.5}).sft_learning_rate == 0.5
    (run.checkpoints / "index.json").write_text(_index(run, sft="sft"))
    with pytest.raises(
        UsageError, match="resume: sft_learning_rate is not read, since supervised fine-tuning is over"
    ):
        resumed_config(run, {"sft_learning_rate": 0.5})
    assert resumed_config(run, {"learning_rate": 0.5}).learning_rate == 0.5
    run.config.write_text(dump_config(dataclasses.replace(config, sft="none")))
    with pytest.raises(UsageError, match="resume: sft_learning_rate is not read, since sft is none"):
        resumed_config(run, {"sft_learning_rate": 0.5})


def _index(run, **roles):
    from rlaif_fast.runs.checkpoint import CheckpointIndex
    from rlaif_fast.runs.integrity import sealed

    return sealed(dataclasses.asdict(CheckpointIndex(**roles)))


@pytest.mark.parametrize("key", ["cache_dir", "output_dir", "data"])
def test_a_home_folder_that_is_not_there_is_named(key):
    with pytest.raises(UsageError, match=r"~nobody-has-this-name/x: there is no such home folder; set HOME"):
        resolved(TrainConfig(**{key: "~nobody-has-this-name/x"}))
