"""How a run ends when it is told to, when its folder goes, and how it is extended."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from test_train import SMALL, metrics

from rlaif_fast import train as train_module
from rlaif_fast.cli import run_command
from rlaif_fast.runs.folder import read_jsonl
from rlaif_fast.runs.termination import EXIT_CODE, Terminated, Termination
from rlaif_fast.trainer import rl


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(folder, cache, **changes):
    values = SMALL | {"output_dir": folder, "cache_dir": cache, "sft_steps": 2} | changes
    return train_module.main([f"--{key}={value}" for key, value in values.items()])


def at_step(monkeypatch, step, act):
    """Call `act` while a step of RL is sampled."""
    original, seen = rl.sample_and_rank, []

    def wrapped(*args):
        seen.append(1)
        if len(seen) == step:
            act()
        return original(*args)

    monkeypatch.setattr(rl, "sample_and_rank", wrapped)


def test_sigterm_finishes_the_step_saves_and_goes_on_alike(tmp_path, cache, monkeypatch, capsys):
    assert start(tmp_path / "whole", cache) == 0
    with monkeypatch.context() as patched:
        at_step(patched, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(tmp_path / "run", cache) == 143
    assert "terminated by SIGTERM" in capsys.readouterr().err
    index = json.loads((tmp_path / "run/checkpoints/index.json").read_text())
    assert index["last"] == "rl-000003" and not (tmp_path / "run/summary.json").exists()
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    phases = [row["phase"] for row in read_jsonl(tmp_path / "run/samples.jsonl")]
    assert phases == [row["phase"] for row in read_jsonl(tmp_path / "whole/samples.jsonl")]
    assert train_module.main(["--resume", str(tmp_path / "run"), "--max_steps", "3"]) == 2
    assert train_module.main(["--resume", str(tmp_path / "run"), "--max_steps", "6"]) == 0
    steps = [row["step"] for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [r["phase"] for r in read_jsonl(tmp_path / "run/samples.jsonl")] == phases


def test_a_folder_that_is_removed_ends_the_run_with_an_error(tmp_path, cache, monkeypatch, capsys):
    at_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    assert start(tmp_path / "run", cache) == 1
    assert "was removed while the run went on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def signalled(code: str) -> int:
    text = f"import os, signal, time\nfrom rlaif_fast.runs.termination import Terminated, Termination\n{code}"
    return subprocess.run([sys.executable, "-c", text], check=False, timeout=120).returncode


def test_a_second_sigterm_and_the_end_of_the_grace_end_at_once():
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    block = "t = Termination({})\nwith t.installed(), t.saving():\n    {}\n    {}\n    os._exit(0)"
    assert signalled(block.format(60, kill, kill)) == EXIT_CODE == 143
    assert signalled(block.format(0.2, kill, "time.sleep(30)")) == 143
    assert signalled(block.format(60, kill, "assert t.requested")) == 0


def test_outside_of_a_step_sigterm_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), Termination(5).installed():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "/a/b: No space left on device; free some space",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "/a"),
            "/a: Too many open files; raise the limit of open",
        ),
        (OSError(errno.EIO, "Input/output error"), "error: Input/output error"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x\x1b"), r"x\x1b: No such file"),
        (OSError("odd"), "error: odd"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_its_place(error, words, capsys):
    def fail():
        raise error

    assert run_command(fail) == 1
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1
