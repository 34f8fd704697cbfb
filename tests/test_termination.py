"""How a run ends when it is told to, when its folder goes, and how it is extended."""

import errno
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import SMALL, metrics

from rlaif_fast import train as train_module
from rlaif_fast.cli import run_command
from rlaif_fast.errors import RlaifFastError, writing
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.termination import EXIT_CODE, Terminated, Termination
from rlaif_fast.trainer import rl


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


def heed_hangups() -> None:
    """As a terminal's processes do, also where these tests were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def signalled(code: str) -> int:
    text = f"import os, signal, time\nfrom rlaif_fast.termination import Terminated, Termination\n{code}"
    command = [sys.executable, "-c", text]
    return subprocess.run(command, check=False, timeout=120, preexec_fn=heed_hangups).returncode


def test_a_terminal_that_is_closed_costs_no_step(tmp_path, cache):
    values = SMALL | {"output_dir": tmp_path, "cache_dir": cache, "sft_steps": 2}
    values |= {"max_steps": 500, "eval_steps": 1000, "lr_scheduler_type": "constant"}
    command = [sys.executable, "-m", "rlaif_fast.train", *(f"--{k}={v}" for k, v in values.items())]
    child, terminal = pty.fork()
    if child == 0:
        heed_hangups()
        os.execv(sys.executable, command)
    while not any(row["stage"] == "rl" for row in metrics(tmp_path)):
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 2**16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_CODE
    steps = [row["step"] for row in metrics(tmp_path) if row["stage"] == "rl"]
    assert json.loads((tmp_path / "checkpoints/index.json").read_text())["last"] == f"rl-{steps[-1]:06d}"


def test_a_second_sigterm_and_the_end_of_the_grace_end_at_once():
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    block = (
        "t = Termination({})\nwith t.installed(), t.saving(lambda: False):\n    {}\n    {}\n    os._exit(0)"
    )
    assert signalled(block.format(60, kill, kill)) == EXIT_CODE == 143
    assert signalled(block.format(0.2, kill, "time.sleep(30)")) == 143
    assert signalled(block.format(60, kill, "assert t.requested")) == 0
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + block
    hangup = "os.kill(os.getpid(), signal.SIGHUP)"
    assert signalled(nohup.format(60, hangup, "assert not t.requested")) == 0
    assert signalled(block.format(60, hangup, "assert t.requested")) == 0
    echo = block.replace("{}", "{}, echo_seconds=0.5", 1)
    assert signalled(echo.format(60, kill, kill)) == 0
    assert signalled(echo.format(60, kill, f"time.sleep(1); {kill}")) == 143


def test_a_step_that_outlasts_its_share_of_the_grace_is_given_up():
    code = """
t = Termination({})
with t.installed(), t.saving(lambda: {}):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    except Terminated as error:
        os._exit(7 if type(error).__name__ == "StepGivenUp" and str(error) == "SIGTERM" else 8)
"""
    assert signalled(code.format(16, True)) == 7
    assert signalled(code.format(2, False)) == EXIT_CODE


def test_a_step_that_is_given_up_costs_no_finished_one(tmp_path, cache, monkeypatch, capsys):
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    assert start(tmp_path / "whole", cache) == 0

    with monkeypatch.context() as patched:
        at_step(patched, 2, hang)
        assert start(tmp_path / "run", cache, grace_seconds=16) == EXIT_CODE
    assert json.loads((tmp_path / "run/checkpoints/index.json").read_text())["last"] == "rl-000001"
    assert "rl step 1 is saved; --resume goes on" in capsys.readouterr().out
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EFBIG, "File too large"), "File too large; raise the limit of file sizes"),
        (
            RuntimeError("[enforce fail at inline_container.cc:603]"),
            "not written to its end; free some space",
        ),
        (Exception("I/O error: No space left on device (os error 28)"), r"\(os error 28\); free some space"),
        (OSError("odd"), "odd"),
    ],
)
def test_what_cannot_be_written_is_named(error, words):
    with pytest.raises(RlaifFastError, match=f"^cannot write /a/b: .*{words}"), writing("/a/b"):
        raise error
    with pytest.raises(KeyError), writing("/a/b"):
        raise KeyError("of another kind")


def test_two_processes_finish_the_step_when_their_group_gets_sigterm(tmp_path, cache):
    """As schedulers and terminals send it: to every process at once, also to those that decode."""
    values = SMALL | {"output_dir": tmp_path, "cache_dir": cache, "sft_steps": 2, "num_processes": 2}
    values |= {"max_steps": 500, "eval_steps": 1000, "lr_scheduler_type": "constant"}
    command = [sys.executable, "-m", "rlaif_fast.train", *(f"--{k}={v}" for k, v in values.items())]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not any(row["stage"] == "rl" for row in metrics(tmp_path)):
            assert run.poll() is None
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGTERM)
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == EXIT_CODE, said
    assert said.count("SIGTERM: the run saves and ends when this step is done") == 1
    assert "crashed" not in said and not (tmp_path / "quarantine.jsonl").exists()
    steps = [row["step"] for row in metrics(tmp_path) if row["stage"] == "rl"]
    assert json.loads((tmp_path / "checkpoints/index.json").read_text())["last"] == f"rl-{steps[-1]:06d}"
    with pytest.raises(ProcessLookupError):  # every process of the group ends, the last ones a moment later
        for _ in range(300):
            os.killpg(run.pid, 0)
            time.sleep(0.1)
