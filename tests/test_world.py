"""Several processes train one policy: the same gradients as one process, the same weights in each, the same again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SMALL, in_a_file, metrics
from world_parts import (
    average_in_buckets,
    be_killed,
    be_killed_in_an_exchange,
    be_killed_unnoticed,
    exchange,
    look_for_folders,
    refuse,
    run_out_of_memory,
)

from rlaif_fast import train as train_module
from rlaif_fast.algorithms.group import minibatches
from rlaif_fast.distributed import launch as launch_module
from rlaif_fast.distributed.launch import launch
from rlaif_fast.distributed.world import World, buckets
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.machine import cores
from rlaif_fast.report.outcome import write_samples
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer import setup
from rlaif_fast.trainer.notes import uneven_steps
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.resolved import process_count


def test_what_two_processes_exchange(tmp_path):
    answers = launch(exchange, str(tmp_path), 2)
    other = json.loads((tmp_path / "1.json").read_text())
    assert (answers["share"], other["share"]) == (["a", "c", "e"], ["b", "d"])
    for got in (answers, other):
        assert got["sum"] == [2.0, 1.0]
        assert got["gather"] == [{"rank": 0}, {"rank": 1}]
        # Four numbers cross, and not the twelve that share their memory.
        assert got["row"] == [[4.0, 5.0, 6.0, 7.0] if got is answers else [0.0, 1.0, 2.0, 3.0], 4 * 4]
        assert got["grads"] == [[1.5] * 3, [4.0] * 4]
        assert got["broadcast"] == 7.0
    assert (tmp_path / "order").read_text() == "01"


def test_one_process_needs_no_group(tmp_path):
    answers = launch(exchange, str(tmp_path), 1)
    assert answers["share"] == list("abcde")
    assert answers["sum"] == [1.0, 0.0]
    assert answers["grads"][0] == [1.0] * 3
    assert not torch.distributed.is_initialized()


def test_buckets_do_not_change_the_averages():
    whole, *parts = launch(average_in_buckets, [2**20, 1, 64], 2)
    assert parts == [whole, whole]


def test_buckets_hold_what_fits():
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 2, 5, 1)]
    weights.insert(1, torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    found = [[p.numel() for p in bucket] for bucket in buckets(weights, 16)]
    assert found == [[2, 2], [5], [1], [3]]


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    apart, shared = launch(look_for_folders, [list(map(str, folders)), [str(folders[0])] * 2], 2)
    for message in apart:
        assert f"process 1 does not see the folder {folders[0]} of process 0" in message
        assert "file system that all of them share" in message
    assert len(apart) == 2 and shared == ["", ""]
    assert not any(entry for folder in folders for entry in folder.iterdir())


@pytest.mark.parametrize(("rank", "error"), [(0, UsageError), (1, RlaifFastError)])
def test_a_process_that_fails_ends_the_run(rank, error, capfd):
    with pytest.raises(error, match=f"process {rank}"):
        launch(refuse, rank, 2)
    if rank == 1:
        assert "error: process 1: process 1 will not" in capfd.readouterr().err
    assert not torch.distributed.is_initialized()


def test_an_error_of_rank_0_is_not_hidden_by_those_it_causes(capfd):
    with pytest.raises(RuntimeError, match="out of memory, says process 0"):
        launch(run_out_of_memory, 0, 3)
    assert "process" not in capfd.readouterr().err
    assert not torch.distributed.is_initialized()


def test_the_process_that_failed_first_is_named(capfd):
    with pytest.raises(RlaifFastError, match=r"process 2 .* exit code 1; its message is above"):
        launch(run_out_of_memory, 2, 3)
    written = capfd.readouterr().err
    assert "out of memory, says process 2" in written
    assert written.count("Traceback") == 1


@pytest.mark.parametrize("work", [be_killed, be_killed_in_an_exchange, be_killed_unnoticed])
@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN])
def test_a_killed_process_is_reported_with_its_signal(work, interrupts, monkeypatch, capfd):
    """Also where interrupts are ignored, as they are behind nohup and in the background of a script."""
    monkeypatch.setattr(launch_module, "PATIENCE", 3.0)
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        started = time.monotonic()
        with pytest.raises(RlaifFastError, match=r"process 1 .* SIGKILL"):
            launch(work, 1, 3)
        assert time.monotonic() - started < 45
        assert signal.getsignal(signal.SIGINT) == interrupts
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capfd.readouterr().err


def test_the_device_of_several_processes(monkeypatch, tmp_path):
    with pytest.raises(
        UsageError, match=r"device: cuda:0 is one GPU, and each of 2 processes .* --device cuda"
    ):
        launch(exchange, str(tmp_path), 2, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch(exchange, str(tmp_path), 2, torch.device("cpu"))["sum"] == [2.0, 1.0]
    with pytest.raises(UsageError, match="process 1 has no GPU, torch sees 1"):
        launch_module._choose_backend(1, torch.device("cuda"))


class Enough(Exception):
    """Ends a process's part once the test has seen what it wanted."""


def test_a_process_checks_the_folder_and_shares_the_cores_of_its_machine(monkeypatch, tmp_path):
    calls: list[object] = []

    def set_threads(threads: int, processes: int) -> None:
        calls.append((threads, processes))
        raise Enough

    monkeypatch.setattr(World, "check_shared", lambda _, folder: calls.append(folder))
    monkeypatch.setattr(setup, "set_threads", set_threads)
    with pytest.raises(Enough):
        train_module.train_in(World(0, 16, local_size=8), TrainConfig(output_dir=str(tmp_path)))
    assert calls == [tmp_path, (0, 8)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launch_module._local_size(16) == 8


def test_only_rank_0_samples_for_the_gallery(tmp_path):
    run_dir = RunDir(tmp_path)
    policy = SimpleNamespace(gathered=nullcontext)
    write_samples(run_dir, "sft", SimpleNamespace(world=World(1, 2), policy=policy))
    assert not run_dir.samples.exists()


def test_steps_that_do_not_divide_evenly_are_told():
    config = TrainConfig(sft_videos_per_step=8, videos_per_step=3)
    assert uneven_steps(config, 1) == []
    (note,) = uneven_steps(config, 2)
    assert note.startswith("videos_per_step: 3 is not a multiple of the 2 processes")
    few = uneven_steps(config, 16)
    assert few[0].startswith("sft_videos_per_step: 8 is fewer than the 16 processes, so 8 of them")
    assert len(few) == 2
    config.sft = "none"
    assert len(uneven_steps(config, 16)) == 1
    cut = TrainConfig(videos_per_step=4, questions_per_video=1, steps_per_generation=4, sft="none")
    assert uneven_steps(cut, 1) == []
    (note,) = uneven_steps(cut, 2)
    assert "4 is more than the 2 groups" in note


def start(work: str, argument: object, patience: float) -> subprocess.Popen:
    """Launch a part of world_parts.py in two processes below a new one, which does not share our signals."""
    script = (
        "import world_parts\n"
        "from rlaif_fast.distributed import launch\n"
        "if __name__ == '__main__':\n"
        f"    launch.PATIENCE = {patience}\n"
        f"    launch.launch(world_parts.{work}, {argument!r}, 2)\n"
    )
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_rank_0_does_not_stay_stuck_behind_a_dead_process():
    process = start("be_killed_while_stuck", 1, patience=1.0)
    _, written = process.communicate(timeout=50)
    assert process.returncode == 1
    assert written.strip() == "error: process 1 of the run was ended by SIGKILL; " + (
        "the machine may have run out of memory"
    )


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_others_end_with_rank_0(ending):
    process = start("sleep", 120, patience=10.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(ending)
    process.communicate(timeout=30)  # every process holds the other end of the pipe
    assert process.returncode == -ending


def train(folder: Path, cache: Path, **changes) -> Path:
    values = SMALL | {"output_dir": folder, "cache_dir": cache} | changes
    assert train_module.main(in_a_file(values, folder.with_suffix(".yaml"))) == 0
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, cache) -> Path:
    """A run of two processes; three videos a step, so that one process has more than the other."""
    return train(tmp_path_factory.mktemp("pair") / "run", cache, num_processes=2, loss_type="dapo")


def test_supervised_steps_are_those_of_one_process(pair, cache, tmp_path):
    alone = train(tmp_path / "alone", cache, max_steps=0)
    one = [row for row in metrics(alone) if row["stage"] == "sft"]
    two = [row for row in metrics(pair) if row["stage"] == "sft"]
    assert len(one) == len(two) == SMALL["sft_steps"]
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    predictions = [list(read_jsonl(folder / "predictions-sft.jsonl")) for folder in (alone, pair)]
    assert [row["example_id"] for row in predictions[0]] == [row["example_id"] for row in predictions[1]]


def test_everything_sampled_is_recorded(pair):
    steps = [row for row in metrics(pair) if row["stage"] == "rl"]
    rollouts = list(read_jsonl(pair / "rollouts.jsonl"))
    assert len(steps) == SMALL["max_steps"]
    for row in steps:
        assert row["groups"] == sum(record["step"] == row["step"] for record in rollouts)
        assert row["tokens"] > 0
    clips = {record["video"] for record in rollouts if record["step"] == 1}
    assert len(clips) == SMALL["videos_per_step"]
    assert json.loads((pair / "summary.json").read_text())["processes"] == 2


def test_resumed_run_equals_an_uninterrupted_one(pair, cache, tmp_path):
    folder = tmp_path / "killed"
    values = SMALL | {"output_dir": folder, "cache_dir": cache, "num_processes": 2, "loss_type": "dapo"}
    words = [f"--{key}={value}" for key, value in values.items()]
    # Die, and with it the process beside, when the first RL checkpoint is written.
    script = (
        "import os, sys\n"
        "from rlaif_fast import train\n"
        "from rlaif_fast.runs.checkpoint import CheckpointStore\n"
        "save = CheckpointStore.save\n"
        "def save_and_die(self, name, *args, **roles):\n"
        "    save(self, name, *args, **roles)\n"
        "    if name == 'rl-000002' and not self.read_only:\n"
        "        os._exit(9)\n"
        "if __name__ == '__main__':\n"
        "    CheckpointStore.save = save_and_die\n"
        "    train.main(sys.argv[1:])\n"
    )
    (tmp_path / "killed.py").write_text(script)
    process = subprocess.run([sys.executable, tmp_path / "killed.py", *words], capture_output=True, text=True)
    assert process.returncode == 9, process.stderr
    assert not (folder / "summary.json").exists()
    assert train_module.main(["--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(pair)


def torchrun(*words: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_the_same_seed_trains_alike_under_torchrun(pair, cache, tmp_path):
    values = SMALL | {"output_dir": tmp_path / "run", "cache_dir": cache, "loss_type": "dapo"}
    process = torchrun("-m", "rlaif_fast.train", *(f"--{key}={value}" for key, value in values.items()))
    assert process.returncode == 0, process.stderr[-2000:]
    assert metrics(tmp_path / "run") == metrics(pair)
    last = "checkpoints/rl-000004/model.safetensors"
    ours, theirs = (load_file(folder / last) for folder in (tmp_path / "run", pair))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_torchrun_waits_for_the_repair_of_a_damaged_configuration(pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text("model: [")
    process = torchrun("-m", "rlaif_fast.train", f"--resume={folder}")
    assert process.returncode == 0, process.stderr[-2000:]
    assert "config.yaml is not as it was written; the checkpoint's copy takes its place" in process.stderr
    assert metrics(folder) == metrics(pair)


def test_restarted_processes_of_torchrun_wait_for_rank_0_again(tmp_path):
    (tmp_path / "turn.py").write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from rlaif_fast.distributed.launch import RankZeroFirst, launch\n"
        "def work(world, folder):\n"
        "    assert world.sum(1.0) == [2.0]\n"
        "if __name__ == '__main__':\n"
        "    ready = Path(__file__).with_name('ready ' + os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "    first = RankZeroFirst()\n"
        "    with first.turn():\n"
        "        if first.rank == 0:\n"
        "            time.sleep(2)\n"
        "            ready.touch()\n"
        "        assert ready.exists()\n"
        "    launch(work, None, 0)\n"
        "    assert ready.name == 'ready 1'\n"
    )
    process = torchrun("--max-restarts=1", str(tmp_path / "turn.py"), timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]


def test_more_processes_than_videos(cache, tmp_path):
    folder = train(tmp_path / "run", cache, num_processes=2, videos_per_step=1, sft_videos_per_step=1)
    steps = [row for row in metrics(folder) if row["stage"] == "rl"]
    assert len(steps) == SMALL["max_steps"]
    assert all(row["groups"] >= 1 and row["grad_norm"] >= 0 for row in steps)


def test_number_of_processes():
    assert process_count(TrainConfig(num_processes=3)) == 3
    assert process_count(TrainConfig(num_processes=0, device="cpu")) == min(cores(), 2)
    with pytest.raises(UsageError, match="num_processes: expected 0 or more, got -1"):
        TrainConfig(num_processes=-1)


def test_minibatches_of_a_process_without_groups():
    assert minibatches([], 3) == [[], [], []]


def test_a_process_that_still_imports_ends_with_its_parent(tmp_path):
    (tmp_path / "parent.py").write_text(
        "import multiprocessing, os, pickle, time\n"
        "from rlaif_fast.distributed import child\n"
        "class Slow:  # as long to unpickle as an import may take\n"
        "    def __reduce__(self):\n"
        "        return time.sleep, (600,)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    process = context.Process(target=child.run, args=(pickle.dumps((print, Slow())),), daemon=True)\n"
        "    process.start()\n"
        "    print(process.pid, flush=True)\n"
        "    os._exit(0)\n"
    )
    # The child has this pipe too: it is read to its end only once both are gone.
    parent = subprocess.run(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert parent.returncode == 0 and parent.stdout.strip().isdigit()
