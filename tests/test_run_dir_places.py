"""Where a run's folder is, and what in it is somebody else's."""

import dataclasses
import os

import pytest

from rlaif_fast.comparison.plan import read_plan
from rlaif_fast.errors import UsageError
from rlaif_fast.outputs import MARKER
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.resolved import resolved


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir.create("~/run").path == RunDir.open("~/run").path == tmp_path / "run"
    config = resolved(dataclasses.replace(TrainConfig(), output_dir="~/run"))
    assert config.output_dir == str(tmp_path / "run")
    plan = tmp_path / "plan.yaml"
    table = "{arms: [a], seeds: [1], feedback: [exact], baseline: a}"
    plan.write_text(f"output_dir: ~/compare\narms: {{a: {{}}}}\ntables: {{t: {table}}}\n")
    assert read_plan(plan).output_dir == tmp_path / "compare"


@pytest.mark.parametrize("finished", [False, True])
def test_what_somebody_keeps_among_the_checkpoints_is_not_overwritten(tmp_path, finished):
    run = RunDir.create(tmp_path / "run")
    for name in ("sft", "rl-000002", ".rl-000003.partial", "merged"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "index.json").touch()
    if finished:
        run.write_summary({})
    with pytest.raises(UsageError, match="merged was not written by a run and would be deleted"):
        RunDir.create(run.path, overwrite=True)
    assert len(list(run.checkpoints.iterdir())) == 5
    (run.checkpoints / "merged").rmdir()
    RunDir.create(run.path, overwrite=True).let_go()
    assert not list(run.checkpoints.iterdir())


def test_a_name_that_is_too_long_is_told_with_its_option(tmp_path):
    with pytest.raises(UsageError, match=r"output_dir .* cannot be written \(File name too long\)"):
        RunDir.create(tmp_path / ("x" * 300))


def test_a_summary_that_was_changed_is_named(tmp_path):
    run = RunDir.create(tmp_path / "run")
    run.metrics.write_text("{}\n")
    run.write_summary({"seconds": 7.0, "config": {"num_generations": 4}, "name": "é"})
    whole, values = run.summary.read_bytes(), run.read_summary()
    assert values["seconds"] == 7.0 and values["sha256"].keys() == {"metrics.jsonl"}
    run.write_summary(values)
    assert run.summary.read_bytes() == whole
    for at in range(0, len(whole), 3):
        run.summary.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert run.read_summary().items() >= {k: v for k, v in values.items() if k != "sha256"}.items()
        except UsageError as error:
            assert "summary.json is not" in str(error)
    # a flipped name of a record would take its digest away
    run.summary.write_bytes(whole.replace(b"metrics.jsonl", b"metricz.jsonl"))
    with pytest.raises(UsageError, match=r"summary\.json is not as the run wrote it"):
        run.read_summary()


def test_create_refuses_a_name_that_is_not_utf_8(tmp_path):
    """Tokenizers cannot be saved under it, which a run met at its first checkpoint."""
    with pytest.raises(UsageError, match=r"'.*/r\\udce9' is not a name in UTF-8"):
        RunDir.create(tmp_path / os.fsdecode(b"r\xe9"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["x", "{}", "[1]", '{"created": null}'])
def test_a_damaged_marker_is_named(tmp_path, text):
    run = RunDir.create(tmp_path / "run")
    (run.path / MARKER).write_text(text)
    for read in (lambda: run.created, lambda: run.began_with("data", {})):
        with pytest.raises(UsageError, match=f"{MARKER} is damaged"):
            read()
