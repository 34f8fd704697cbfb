"""A judge goes down, files turn bad, SIGTERM comes, code has a bug: no finished step is lost, and runs go on alike."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_runs import SMALL, in_a_file, metrics
from world_parts import exceed_the_limit, lose_the_judge, meet_in_a_step

from rlaif_fast import train as train_module
from rlaif_fast.cli import run_command
from rlaif_fast.distributed.launch import launch
from rlaif_fast.distributed.world import SharedOutage
from rlaif_fast.errors import UsageError
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.logging import RunLogger
from rlaif_fast.trainer import rl, sft
from rlaif_fast.trainer import run as run_module
from rlaif_fast.video.errors import TooManyBadFiles

# Trains in processes of which the last meets something in the second step of RL: `act(run)` once it was ranked.
SCRIPT = """
import os, signal, sys, time
from rlaif_fast import train
from rlaif_fast.distributed import launch
from rlaif_fast.oracle import OracleFailedError
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.trainer import rl
sample, complete = rl.sample_and_rank, CheckpointStore._complete
def go_down(run):
    raise OracleFailedError("the judge is down")
def have_a_bug(run):
    raise KeyError("verdict")
def be_killed(run):
    os.kill(os.getpid(), signal.SIGKILL)
def get_sigterm(run):
    os.kill(os.getpid(), signal.SIGTERM)
def get_sigterm_from_scheduler_and_torchrun(run):
    get_sigterm(run)
    get_sigterm(run)
def sample_and_meet(run, order, step):
    drawn = sample(run, order, step)
    if step == 1 and run.world.rank == run.world.size - 1:
        {act}(run)
    return drawn
def complete_slowly(store, target, *args):
    time.sleep(4 * target.name.startswith("rl-"))  # longer than others wait for rank 0
    complete(store, target, *args)
rl.sample_and_rank, CheckpointStore._complete, launch.PATIENCE = sample_and_meet, complete_slowly, 1.0
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
FEW = {"sft_steps": 5, "max_steps": 2, "eval_steps": 1}  # evaluates once in the supervised stage
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def words(folder, cache, **changes) -> list[str]:
    values = SMALL | {"output_dir": folder, "cache_dir": cache, "sft_steps": 2} | changes
    return [f"--{key}={value}" for key, value in values.items()]


def last(folder) -> str:
    return json.loads((folder / "checkpoints" / "index.json").read_text())["last"]


def test_all_processes_learn_of_an_outage_and_rank_0_alone_tells_it(tmp_path, capfd):
    with pytest.raises(SharedOutage, match="process 1: the judge is down"):
        launch(lose_the_judge, str(tmp_path), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("met", "code", "line"),
    [
        (
            UsageError("oracle judge: expected 8 rankings, got 7"),
            2,
            "oracle judge: expected 8 rankings, got 7",
        ),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ],
)
def test_the_exit_code_is_that_of_what_a_process_met(capfd, met, code, line):
    assert run_command(lambda: launch(meet_in_a_step, met, 2)) == code
    assert capfd.readouterr().err.splitlines()[-1] == f"error: process 1: {line}"


def test_shards_that_one_process_cannot_write_are_told_in_a_line_by_all(tmp_path):
    folders = {asynchronous: tmp_path / str(asynchronous) for asynchronous in (False, True)}
    for folder in folders.values():
        folder.mkdir()
    for asynchronous, told in launch(
        exceed_the_limit, {key: str(path) for key, path in folders.items()}, 2
    ).items():
        folder = folders[asynchronous]
        reason = f"cannot write checkpoint {folder / 'rl-000001'}: a file was not written to its end"
        assert len(told) == 2 and all(line.startswith(reason) for line in told)
        assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def pair(tmp_path_factory, cache):
    """The run of two processes that meets nothing."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    assert train_module.main(words(folder, cache, num_processes=2)) == 0
    return folder


def meet(act, launcher, folder, cache) -> tuple[int, str]:
    """Train two processes that meet `act`; the exit code, and what they said on stderr."""
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT.format(act=act))
    process = subprocess.run(
        [sys.executable, *launcher, script, *words(folder, cache, num_processes=2, grace_seconds=60)],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stderr


def test_two_processes_save_what_they_have_when_one_loses_its_judge(pair, cache, tmp_path):
    """However long rank 0 writes: the others wait for it, and say nothing themselves."""
    code, said = meet("go_down", TORCHRUN, tmp_path / "run", cache)
    assert code == 1 and last(tmp_path / "run") == "rl-000001", said
    assert said.count("error: process 1: the judge is down") == said.count("error: ") == 1
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(pair)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("have_a_bug", "error: process 1: KeyError: 'verdict'"),
        ("be_killed", "error: process 1 of the run was ended by SIGKILL"),
    ],
)
def test_rank_0_saves_the_last_finished_step_whatever_ends_another_process(pair, cache, tmp_path, act, words):
    """However long it takes: nothing interrupts it meanwhile."""
    code, said = meet(act, (), tmp_path / "run", cache)
    assert code == 1 and words in said and last(tmp_path / "run") == "rl-000001", said
    assert (act == "have_a_bug") == ("in have_a_bug" in said)  # the traceback
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(pair)


@pytest.mark.parametrize(
    ("act", "launcher", "code"),
    [("get_sigterm", (), 143), ("get_sigterm_from_scheduler_and_torchrun", TORCHRUN, 1)],
)
def test_sigterm_to_one_of_two_processes_leaves_rank_0_the_time_to_save(cache, tmp_path, act, launcher, code):
    ended, said = meet(act, launcher, tmp_path / "run", cache)
    assert ended == code and "terminated by SIGTERM" in said and "connection" not in said
    assert last(tmp_path / "run") == "rl-000002"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The run of one process that meets nothing."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_module.main(words(folder, cache, **FEW)) == 0
    return folder


def goes_on_alike(whole, folder) -> bool:
    if train_module.main(["--resume", str(folder)]) != 0 or metrics(folder) != metrics(whole):
        return False
    names = ("predictions-sft.jsonl", "predictions-final.jsonl", "samples.jsonl", "rollouts.jsonl")
    return all(list(read_jsonl(folder / name)) == list(read_jsonl(whole / name)) for name in names)


# Evaluations: of validation in the supervised stage, of its test, of validation where RL begins and behind its steps.
@pytest.mark.parametrize(("number", "saved"), [(1, "sft-000004"), (2, "sft"), (4, "rl-000001")])
def test_an_evaluation_that_fails_costs_no_step(whole, cache, tmp_path, monkeypatch, capsys, number, saved):
    folder, calls, evaluate = tmp_path / "run", [], run_module.evaluate

    def evaluate_or_fail(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise TooManyBadFiles("9 of 50 files are bad")
        return evaluate(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "evaluate", evaluate_or_fail)
        assert train_module.main(words(folder, cache, **FEW)) == 1
    assert "9 of 50 files are bad" in capsys.readouterr().err
    assert last(folder) == saved
    assert goes_on_alike(whole, folder)


def test_supervised_steps_before_too_many_files_were_bad_are_not_lost(whole, cache, tmp_path, monkeypatch):
    folder, taught = tmp_path / "run", sft.taught

    def taught_or_fail(run, order, step):
        if step == 2:
            raise TooManyBadFiles("9 of 50 files are bad")
        return taught(run, order, step)

    with monkeypatch.context() as patched:
        patched.setattr(sft, "taught", taught_or_fail)
        assert train_module.main(words(folder, cache, **FEW)) == 1
    assert last(folder) == "sft-000002"
    assert goes_on_alike(whole, folder)


class Bug(Exception):
    """Of the code of somebody who trains."""


# In a rollout; in the update behind it; in the supervised stage; in an evaluation; where its figures are written.
@pytest.mark.parametrize(
    ("module", "name", "number", "ending", "saved"),
    [
        (rl, "sample_and_rank", 2, Bug("no verdict"), "rl-000001"),
        (rl, "update_loss", 2, torch.OutOfMemoryError("no memory"), "rl-000001"),
        (sft, "learn", 4, Bug("no verdict"), "sft-000003"),
        (run_module, "evaluate", 4, KeyboardInterrupt(), "rl-000001"),
        (RunLogger, "message", -1, KeyboardInterrupt(), "rl-000001"),
    ],
)
def test_an_error_that_is_no_outage_costs_no_finished_step(
    whole, cache, tmp_path, monkeypatch, capsys, module, name, number, ending, saved
):
    folder, calls, original = tmp_path / "run", [], getattr(module, name)

    def fail_once(*args, **options):
        calls.append(args)
        last_step_is_logged = name == "message" and "rl step 2, validation" in args[1]
        if len(calls) == number or last_step_is_logged:
            raise ending
        return original(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fail_once)
        code = train_module.main(words(folder, cache, **FEW))
    assert code == (130 if isinstance(ending, KeyboardInterrupt) else 1)
    if name == "message":  # the evaluation stands in the log and in no checkpoint
        assert "rl step 2 is not saved: the run ended inside an update or a record" in capsys.readouterr().out
    assert last(folder) == saved
    assert goes_on_alike(whole, folder)


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_gradient_that_is_not_finite_costs_the_step_alone(cache, tmp_path, monkeypatch, capsys, iterations):
    """What is half learned from is not saved as a step."""
    folder, calls, update_loss = tmp_path / "run", [], rl.update_loss

    def explode_last(run, *args):
        stats = update_loss(run, *args)
        calls.append(stats)
        if len(calls) == 2 * iterations:
            next(p for p in run.policy.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return stats

    with monkeypatch.context() as patched:
        patched.setattr(rl, "update_loss", explode_last)
        assert (
            train_module.main(words(folder, cache, **FEW | {"eval_steps": 9}, num_iterations=iterations)) == 1
        )
    said = capsys.readouterr()
    assert "the gradient is not finite" in said.err
    assert last(folder) == ("rl-000001" if iterations == 1 else "sft")
    assert (
        "rl step 1 is saved" if iterations == 1 else "rl step 1 is not saved: the run ended inside"
    ) in said.out
    assert train_module.main(["--resume", str(folder)]) == 0


def test_a_checkpoint_that_could_not_be_written_meanwhile_is_the_reason(cache, tmp_path, monkeypatch, capsys):
    folder, complete = tmp_path / "run", CheckpointStore._complete

    def complete_or_not(store, target, *args):
        if target.name == "rl-000001":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        complete(store, target, *args)

    monkeypatch.setattr(CheckpointStore, "_complete", complete_or_not)
    assert train_module.main(words(folder, cache, **FEW, async_checkpoints="true")) == 1
    said = capsys.readouterr()
    assert "rl-000001: No space left on device; free some space" in said.err
    assert "rl step 2 is not saved: the checkpoint before it could not be written" in said.out
    assert last(folder) == "sft"


def test_the_peak_of_memory_is_that_of_all_sessions(cache, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "peak_rss_bytes", lambda: 2**50)
        patched.setattr(rl, "sample_and_rank", lambda *args: 1 / 0)
        assert train_module.main(words(folder, cache, **FEW)) == 1
    assert train_module.main(["--resume", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["peak_rss_bytes"] == 2**50


def test_a_run_goes_on_where_no_clip_of_the_gallery_can_be_read(tmp_path, cache):
    data = tmp_path / "data"
    data.mkdir()
    (data / "bad.mp4").write_text("no video\n" * 50)
    for split in ("sft", "rl", "validation", "test"):
        rows = [
            {"id": f"{split} {n}", "question": f"what color is {split} {n} ?", "answer": "red"}
            for n in (1, 2, 3)
        ]
        if split == "test":
            rows[0]["video"] = "bad.mp4"
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    values = SMALL | {
        "output_dir": folder,
        "cache_dir": cache,
        "data": data,
        "max_bad_fraction": 1,
        "report": "true",
    }
    assert train_module.main(in_a_file(values, tmp_path / "run.yaml")) == 0
    asked = [row["example_id"] for row in read_jsonl(folder / "predictions-final.jsonl")]
    assert asked == ["test 2", "test 3"]
    assert not list(read_jsonl(folder / "samples.jsonl"))
