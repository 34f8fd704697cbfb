"""The train command with sharded weights: started in both ways, killed, and resumed."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fuzzing import fuzz_seed
from safetensors.torch import load_file
from tiny_runs import SMALL, metrics

pytestmark = pytest.mark.slow

SEED = fuzz_seed()
KILLS = int(os.environ.get("RLAIF_FAST_KILLS", "4"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LIMIT = 3600  # seconds, after which a run is taken to be stuck


def words(folder: Path, cache: Path, **changes) -> list[str]:
    values = SMALL | {
        "output_dir": folder,
        "cache_dir": cache,
        "sft_steps": 2,
        "eval_steps": 1,
        "videos_per_step": 4,
    }
    values |= {"sharding": "fsdp2", "num_processes": 2} | changes
    return [f"--{key}={value}" for key, value in values.items()]


def start(arguments: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """The train command in a process group of its own."""
    command = [sys.executable, *launcher, "-m", "rlaif_fast.train", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every checkpoint that a run kept."""
    return {
        path.parent.name: load_file(path) for path in sorted(folder.glob("checkpoints/*/model.safetensors"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(words(folder, cache)))
    return folder


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(process: subprocess.Popen, folder: Path, count: int, pause: float) -> bool:
    """Kill the whole group behind that many logged lines and a pause; whether it was still running."""
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and lines(folder) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(pause)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    return running


@pytest.mark.parametrize("meanwhile", ["false", "true"])
def test_a_killed_run_ends_at_the_same_weights_to_the_bit(whole, cache, tmp_path, meanwhile):
    rng, folder, killed = random.Random(SEED), tmp_path / "run", 0
    arguments = words(folder, cache, async_checkpoints=meanwhile)
    for _ in range(KILLS):
        process = start(arguments)
        # Behind `lines` as they are now: a resumed run cuts back what is behind its checkpoint, then logs on.
        moment = lines(folder) + rng.randint(1, 4)
        if not kill_at(process, folder, moment, rng.uniform(0, 1)):
            break
        killed += 1
        arguments = ["--resume", str(folder)]
    print(f"killed {killed} times")  # shown by -rP
    assert killed >= min(KILLS, 2)
    if not (folder / "summary.json").exists():
        finish(start(arguments))
    assert metrics(folder) == metrics(whole)
    ours, expected = weights(folder), weights(whole)
    assert ours.keys() == expected.keys() and len(expected) >= 2
    for name, tensors in expected.items():
        assert ours[name].keys() == tensors.keys()
        assert all(torch.equal(ours[name][key], tensor) for key, tensor in tensors.items()), name


def test_torchrun_trains_alike(whole, cache, tmp_path):
    finish(start(words(tmp_path / "run", cache), TORCHRUN))
    assert metrics(tmp_path / "run") == metrics(whole)


def test_two_agents_of_torchrun_train_alike(whole, cache, tmp_path):
    """As on two machines with one process each: every agent knows one process, and the weights are cut over both."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agent = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1")
    arguments = words(tmp_path / "run", cache, sharding_size=2)
    agents = [start(arguments, (*agent, f"--master-port={port}", f"--node-rank={k}")) for k in range(2)]
    for process in agents:
        finish(process)
    assert metrics(tmp_path / "run") == metrics(whole)


def test_the_first_losses_are_those_of_a_run_that_is_not_sharded(whole, cache, tmp_path):
    finish(start(words(tmp_path / "run", cache, sharding="none")))
    ours, expected = metrics(whole), metrics(tmp_path / "run")
    assert [(row["stage"], row["step"]) for row in ours] == [(row["stage"], row["step"]) for row in expected]
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert ours[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)


def test_a_run_that_draws_from_its_start_ends(cache, tmp_path):
    finish(start(words(tmp_path / "run", cache, algorithm="dpo", beta=0.1)))
    assert (tmp_path / "run" / "summary.json").exists()
    assert all(
        torch.isfinite(torch.tensor(row["loss"])) for row in metrics(tmp_path / "run") if "loss" in row
    )
