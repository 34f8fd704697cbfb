"""Damages to a run that really trained: every one told, none used, and the run that goes on ends alike."""

import json
import random
import shutil
from collections import Counter

import pytest
import yaml
from fuzzing import counts, fuzz_seed
from test_recovery import KINDS, files_of, flip, last, recovers
from tiny_runs import SMALL, metrics

from rlaif_fast import train as train_module
from rlaif_fast.outputs import MARKER
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import unseal
from rlaif_fast.runs.recovery import recover
from rlaif_fast.trainer import rl

SEED = fuzz_seed()


def train(folder, cache) -> int:
    """Four steps of RL with a checkpoint after each; the exit code."""
    values = {"output_dir": folder, "cache_dir": cache, "sft_steps": 2, "eval_steps": 1, "max_steps": 4}
    return train_module.main([f"--{key}={value}" for key, value in (SMALL | values).items()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> RunDir:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, cache) == 0
    return RunDir(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cache, whole) -> RunDir:
    """The same run, killed behind its third step of RL."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    class Killed(BaseException):
        pass

    sample, calls = rl.sample_and_rank, []

    def sample_or_die(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return sample(*args)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(rl, "sample_and_rank", sample_or_die)
        train(folder, cache)
    return RunDir(folder)


@pytest.mark.parametrize("kinds", counts(1, len(KINDS)))
def test_every_file_of_a_real_run_is_damaged(stopped, tmp_path, kinds):
    """None silently, each told in a line, an earlier whole checkpoint used wherever there is one."""
    print(f"RLAIF_FAST_FUZZ_SEED={SEED}")
    newest = last(stopped)
    assert newest == "rl-000003"
    logs = unseal(stopped.checkpoints / newest / "manifest.json")["logs"]
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    files = [path.relative_to(stopped.path) for path in files_of(stopped)]
    for name, damage in [(name, damage) for name in files for damage in rng.sample(KINDS, kinds)]:
        limit = logs.get(str(name), (None,))[0]
        if limit == 0:  # a record that nothing vouches for: what it holds is dropped
            continue
        run = RunDir(shutil.copytree(stopped.path, tmp_path / "run"))
        path = run.path / name
        before = path.read_bytes()
        damage(path, rng, limit)
        where = f"{damage.__name__} {name}"
        assert not path.exists() or path.read_bytes() != before, where
        if not recovers(run, path, where):
            outcomes["refused"] += 1
        else:
            assert last(run) != newest or newest not in path.parts, where
            assert recover(run) == [], where  # and what is left is whole
            outcomes["an earlier checkpoint" if last(run) != newest else "the newest"] += 1
        shutil.rmtree(run.path)
    print(dict(outcomes))
    assert (
        outcomes["an earlier checkpoint"] >= kinds * sum(newest in name.parts for name in files) >= 10 * kinds
    )


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "manifest.json"])
def test_a_run_with_a_damaged_checkpoint_goes_on_and_ends_alike(whole, stopped, name, tmp_path, capsys):
    run = RunDir(shutil.copytree(stopped.path, tmp_path / "run"))
    flip(run.checkpoints / "rl-000003" / name, random.Random(SEED))
    assert train_module.main(["--resume", str(run.path)]) == 0
    assert f"damaged: {run.checkpoints / 'rl-000003' / name} " in capsys.readouterr().err
    assert metrics(run.path) == metrics(whole.path)


def test_a_finished_run_keeps_its_results_where_a_command_to_extend_it_is_refused(whole, tmp_path, capsys):
    run = RunDir(shutil.copytree(whole.path, tmp_path / "run"))
    run.report.write_text("a report")
    run.figures.mkdir()
    (run.figures / "overview.png").write_bytes(b"a figure")

    def contents():
        return {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    before = contents()
    refused = {
        "beta cannot change": ["--beta", "0.5"],
        "no option 'tolerence'": ["--oracle_options", "{tolerence: 0.1}"],
        "gave no verdict": [],
    }
    judge = {"oracle": "api", "oracle_options": {"model": "judge", "base_url": "http://127.0.0.1:9/v1"}}
    for reason, words in refused.items():
        if reason == "gave no verdict":  # the judge is down
            text = yaml.safe_dump(yaml.safe_load(run.config.read_text()) | judge)
            run.config.write_text(text)
            CheckpointStore(run.checkpoints, {}).note_config(text)
            before = contents()
        assert train_module.main(["--resume", str(run.path), "--max_steps", "6", *words]) != 0
        assert reason in capsys.readouterr().err
        assert contents() == before, reason


def test_a_finished_run_keeps_its_results_where_its_data_were_replaced(whole, tmp_path, capsys):
    run = RunDir(shutil.copytree(whole.path, tmp_path / "run"))
    marker = run.path / MARKER
    began = json.loads(marker.read_text())
    began["data"]["test"] = "1 rows, of another file"
    marker.write_text(json.dumps(began))
    kept = [run.config, run.summary, run.predictions("final"), *run.records]
    before = {path: path.read_bytes() for path in kept if path.exists()}
    assert train_module.main(["--resume", str(run.path), "--max_steps", "6"]) == 2
    assert "test" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept if path.exists()} == before
