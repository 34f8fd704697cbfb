"""Where a run's folder is, and what in it is somebody else's."""

import dataclasses

import pytest

from rlaif_fast.comparison.plan import read_plan
from rlaif_fast.errors import UsageError
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
