"""Metrics in other people's trackers: names, steps, faults; and the real libraries where they are installed."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import re
import sys
import types

import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.runs import trackers
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.logging import RunLogger
from rlaif_fast.runs.trackers import MAKERS, check_trackers, metrics_of
from rlaif_fast.termination import Terminated
from rlaif_fast.trainer.options import TrainConfig

RL = {"completion_length": 7.5, "truncated": 0.25, "no_signal": 0.5, "clip_low": 0.1, "loss": 1.0, "kl": 0.2}
RL["tokens"] = 60


@pytest.fixture
def played(monkeypatch):
    """A module that stands where Weights & Biases would, to make it fail."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.given, module.logged, module.finished = [], [], []
    module.init = lambda **options: module.given.append(options)
    module.log = lambda values, step: module.logged.append((step, values))
    module.finish = lambda exit_code: module.finished.append(exit_code)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name in MAKERS or None)
    return module


def logger(folder, said=None, name="wandb") -> RunLogger:
    return RunLogger(
        folder, tensorboard=False, stream=said or io.StringIO(), report_to=[name], config={"seed": 3}
    )


def test_names_are_trls_and_steps_never_fall(played, tmp_path):
    folder = RunDir.create(tmp_path / "mine")
    with logger(folder) as log:
        log.log("sft", 1, loss=2.0, tokens=100)
        log.log("sft", 2, loss=1.5)
        log.log(
            "eval",
            2,
            phase="sft",
            split="test",
            accuracy=0.4,
            by_category={"counting": {"accuracy": 0.5, "n": 4}},
        )
        log.log("eval", 0, phase="rl", split="validation", accuracy=0.45)
        log.log("rl", 1, **RL)
        log.log("eval", 1, phase="rl", split="validation", accuracy=0.5)
    assert played.finished == [0]
    [given] = played.given
    assert given["name"] == "mine" and given["resume"] == "allow" and given["config"] == {"seed": 3}
    assert [step for step, _ in played.logged] == [1, 2, 2, 2, 3, 3]
    assert played.logged[0][1] == {"sft/loss": 2.0, "sft/tokens": 100.0}
    assert played.logged[2][1] == {"eval_test_accuracy": 0.4, "eval_test_accuracy/counting": 0.5}
    assert played.logged[4][1] == {
        "completions/mean_length": 7.5,
        "completions/clipped_ratio": 0.25,
        "frac_reward_zero_std": 0.5,
        "clip_ratio/low_mean": 0.1,
        "loss": 1.0,
        "kl": 0.2,
        "tokens": 60.0,  # of the step; TRL's num_tokens counts all since the run began
    }
    # Resumed, it goes on under the same identity, behind the steps that are there.
    with logger(folder) as log:
        log.log("rl", 2, **RL)
    assert played.given[1]["id"] == given["id"] and played.logged[-1][0] == 4


def test_trl_has_these_names():
    import inspect

    grpo = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
    source = inspect.getsource(grpo)
    for name in trackers.TRL_NAMES.values():
        assert name in source, name


def test_mlflow_gets_names_that_it_takes(tmp_path, monkeypatch):
    """It refuses a category's other characters, and nothing more was reported after the first evaluation."""
    module = types.ModuleType("mlflow")
    module.set_experiment = module.log_params = lambda *_, **__: None
    module.start_run, module.end_run = lambda **_: None, lambda status: None
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    module.search_runs = lambda **_: []
    module.log_metrics = lambda values, step: module.logged.extend(values)
    module.logged = []
    monkeypatch.setitem(sys.modules, "mlflow", module)
    folder = RunDir.create(tmp_path / "run")
    with RunLogger(folder, tensorboard=False, stream=io.StringIO(), report_to=["mlflow"]) as log:
        log.log("eval", 1, phase="rl", split="test", by_category={"who? (names)": {"accuracy": 0.5, "n": 2}})
    assert module.logged == ["eval_test_accuracy/who_ _names_"]


def test_a_tracker_that_fails_does_not_end_the_run(played, tmp_path):
    def fail(values, step):
        raise ConnectionError("gone\nmore")

    played.log = fail
    said = io.StringIO()
    folder = RunDir.create(tmp_path / "run")
    with logger(folder, said) as log:
        log.log("rl", 1, loss=1.0)
        log.log("rl", 2, loss=1.0)
    assert said.getvalue().count("wandb: no longer reported to (ConnectionError: gone)") == 1
    assert folder.metrics.read_text().count("\n") == 2 and played.finished == []


def test_a_run_that_fails_is_not_reported_as_finished(played, tmp_path):
    for error in (ValueError("no"), KeyboardInterrupt(), Terminated()):
        with pytest.raises(type(error)), logger(RunDir.create(tmp_path / "run", overwrite=True)) as log:
            log.log("rl", 1, loss=1.0)
            raise error
    assert played.finished == [1, 1, 1]


def test_trackers_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="trackio, wandb, swanlab, mlflow, got 'comet'"):
        TrainConfig(report_to=["comet"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install wandb"):
        check_trackers(["wandb"])
    check_trackers([])


def test_text_and_truth_are_no_metrics():
    record = {"stage": "rl", "step": 1, "time": 3.0, "loss": 1, "note": "x", "flag": True, "none": None}
    assert metrics_of(record) == {"loss": 1.0}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The real libraries keep what they get below the test's folder."""
    monkeypatch.chdir(tmp_path)
    for variable, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("SWANLAB_MODE", "offline"),
        ("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db"),
        ("TRACKIO_DIR", str(tmp_path / "trackio")),
    ):
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_real_library(name, tmp_path, offline):
    """Where it is installed: it takes what it is given, a resumed run, and one that fails."""
    pytest.importorskip(name, exc_type=ImportError)
    folder = RunDir.create(tmp_path / "run")
    for step in (1, 2):
        said = io.StringIO()
        with RunLogger(folder, tensorboard=False, stream=said, report_to=[name], config={"seed": 3}) as log:
            log.log("rl", step, **RL)
            log.log(
                "eval",
                step,
                phase="rl",
                split="test",
                by_category={"who? (names)": {"accuracy": 0.5, "n": 2}},
            )
        assert "no longer reported to" not in said.getvalue()
    with pytest.raises(KeyboardInterrupt), logger(folder, said, name) as log:
        log.log("rl", 3, **RL)
        raise KeyboardInterrupt
    assert "no longer reported to" not in said.getvalue()


def test_runs_of_one_name_in_two_folders_are_two_to_trackio(tmp_path, offline, capsys):
    """It resumes by name, so a second seed was appended to the first."""
    pytest.importorskip("trackio", exc_type=ImportError)
    for place in ("a", "b"):
        folder = RunDir.create(tmp_path / place / "run")
        for step in (1, 2):
            with logger(folder, name="trackio") as log:
                log.log("rl", step, loss=1.0)
    said = capsys.readouterr().out
    names = re.findall(r"(Created new|Resumed existing) run: (run-\w+)", said)
    assert [how for how, _ in names] == ["Created new", "Resumed existing"] * 2
    assert len({name for _, name in names}) == 2


@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (ValueError(), "FAILED")])
def test_mlflow_knows_how_a_run_ended(error, status, tmp_path, offline):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    with contextlib.suppress(ValueError), logger(RunDir.create(tmp_path / "run"), name="mlflow") as log:
        log.log("rl", 1, loss=1.0)
        if error is not None:
            raise error
    [run] = mlflow.search_runs(experiment_names=["rlaif_fast"], output_format="list")
    assert run.info.status == status
