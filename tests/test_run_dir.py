"""The run directory: what it refuses, that a summary is whole or absent, and what a resumed run keeps."""

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.runs import checkpoint as checkpoint_module
from rlaif_fast.runs import folder as module
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import plain, read_jsonl, write_jsonl
from rlaif_fast.runs.folder import RunDir


def test_create_makes_parents_and_an_unfinished_run(tmp_path):
    run = RunDir.create(tmp_path / "a" / "b")
    assert run.path.is_dir() and run.checkpoints.is_dir()
    assert not run.finished
    assert RunDir.open(run.path).path == run.path


def test_create_takes_an_empty_folder(tmp_path):
    assert RunDir.create(tmp_path).path == tmp_path


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_never_touches_a_folder_that_is_not_ours(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not made by a run"):
        RunDir.create(tmp_path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_create_refuses_a_finished_run_unless_told(tmp_path):
    run = RunDir.create(tmp_path / "run")
    run.write_summary({"final_accuracy": 0.5})
    (run.path / "notes.txt").write_text("mine")
    written = [run.config, run.metrics, run.rollouts, run.samples, run.quarantine, run.report]
    for file in (*written, run.predictions("sft")):
        file.write_text("{}\n")
    with pytest.raises(UsageError, match="finished run"):
        RunDir.create(run.path)
    assert run.read_summary() == {"final_accuracy": 0.5}

    again = RunDir.create(run.path, overwrite=True)
    assert not again.finished and again.created > 0
    assert {entry.name for entry in again.path.iterdir()} == {
        module.MARKER,
        module.LOCK,
        module.REPLACED,
        "checkpoints",
        "notes.txt",
    }
    assert (run.path / "notes.txt").read_text() == "mine"
    again.let_go()
    assert not (run.path / module.REPLACED).exists() and not again.restore()


def made_run(path, steps):
    run = RunDir.create(path)
    (run.checkpoints / "rl-10").mkdir()
    run.metrics.write_text("{}\n" * steps)
    run.predictions("sft").write_text("{}\n")
    run.write_summary({"final_accuracy": 0.5})
    return run


def contents(path):
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in path.rglob("*")
        if f.is_file() and f.name != module.LOCK
    }


@pytest.mark.parametrize("killed_after", [None, *range(1, 12)])
def test_a_run_that_is_replaced_comes_back_where_the_other_never_began(tmp_path, monkeypatch, killed_after):
    """Also where the process is killed at any of the renames on the way out or back."""
    run = made_run(tmp_path / "run", 3)
    before, moves = contents(run.path), iter(range(1, 100))
    rename = Path.rename

    def until_killed(source, target):
        if next(moves) == killed_after:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", until_killed)
    try:
        again = RunDir.create(run.path, overwrite=True)
        again.metrics.write_text("{}\n")
        (again.checkpoints / "half").mkdir()
        assert again.restore()
    except KeyboardInterrupt:
        monkeypatch.undo()
        with pytest.raises(UsageError, match="finished run"):
            RunDir.create(run.path)
    assert contents(run.path) == before and (run.checkpoints / "rl-10").is_dir()
    assert {entry.name for entry in run.path.iterdir()}.isdisjoint({module.REPLACED, module.MOVING})


def test_what_was_let_go_is_not_put_back(tmp_path, monkeypatch):
    run = made_run(tmp_path / "run", 3)
    again = RunDir.create(run.path, overwrite=True)
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # killed before it is deleted
    again.let_go()
    monkeypatch.undo()
    assert not again.restore()
    again.write_summary({})
    RunDir.create(run.path, overwrite=True).let_go()
    assert not (run.path / module.REPLACED).exists()


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    run = RunDir.create(tmp_path / "run")
    with run.lock():
        with pytest.raises(UsageError, match="in use by a run that still goes on"):
            RunDir.create(run.path, overwrite=True)
        with pytest.raises(UsageError, match="in use"), RunDir.open(run.path).lock():
            pass
        assert run.checkpoints.is_dir()
    with RunDir.open(run.path).lock():
        pass


def test_create_takes_a_folder_that_was_locked_and_never_begun(tmp_path):
    (tmp_path / module.LOCK).touch()
    assert RunDir.create(tmp_path).created > 0


def test_create_refuses_to_lose_checkpoints(tmp_path):
    run = RunDir.create(tmp_path / "run")
    RunDir.create(run.path)  # nothing to lose yet
    (run.checkpoints / "rl-10").mkdir()
    with pytest.raises(UsageError, match="--resume"):
        RunDir.create(run.path)
    RunDir.create(run.path, overwrite=True)
    assert not any(run.checkpoints.iterdir())


def test_create_refuses_a_file_and_what_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        RunDir.create(file)
    with pytest.raises(UsageError, match="cannot be written"):
        RunDir.create(file / "below")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a read-only file system")
def test_create_refuses_a_read_only_file_system():
    with pytest.raises(UsageError, match="cannot be written"):
        RunDir.create("/proc/rlaif-fast")


def test_create_refuses_a_full_disk(tmp_path):
    with pytest.raises(UsageError, match=r"disk space left and the run needs at least 1000000\.0 TB"):
        RunDir.create(tmp_path / "run", min_free_bytes=10**18)
    assert not (tmp_path / "run" / module.MARKER).exists()


def test_open_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        RunDir.open(tmp_path / "missing")
    with pytest.raises(UsageError, match="not made by a run"):
        RunDir.open(tmp_path)


def test_every_message_is_one_line(tmp_path):
    (tmp_path / "x").write_text("")
    for call in (RunDir.create, RunDir.open):
        with pytest.raises(UsageError) as caught:
            call(tmp_path)
        assert "\n" not in str(caught.value)


def test_summary_of_an_unfinished_run_says_so(tmp_path):
    with pytest.raises(UsageError, match="did not finish"):
        RunDir.create(tmp_path).read_summary()


def test_a_summary_that_cannot_be_written_leaves_none(tmp_path, monkeypatch):
    run = RunDir.create(tmp_path)
    with pytest.raises(TypeError, match="object"):
        run.write_summary({"bad": object()})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_summary({"final_accuracy": 1.0})
    assert not run.finished
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("prepare", "left"),
    [
        (lambda path: partial(RunDir.create, path), "..rlaif-fast-run.*.tmp"),
        (lambda path: partial(RunDir.create(path).write_summary, {}), ".summary.json.*.tmp"),
        (
            lambda path: CheckpointStore(RunDir.create(path).checkpoints, {}).mark,
            "checkpoints/.index.json.*.tmp",
        ),
    ],
    ids=["marker", "summary", "index"],
)
def test_a_kill_while_a_file_is_written_leaves_none(tmp_path, prepare, left):
    """What it leaves under a temporary name goes with the next run that has the folder."""
    path = tmp_path / "run"
    write = prepare(path)
    begun = path.exists()
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os._exit(9)
        try:
            write()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not RunDir(path).finished
    assert len(list(path.glob(left))) == 1
    own = path / ".notes.txt.12.tmp"
    if begun:
        own.touch()
        with RunDir.open(path).lock():
            assert own.exists() and not list(path.glob(left))
    RunDir.create(path)
    assert not list(path.glob(left))


def test_summary_holds_numbers_of_every_kind_and_stays_json(tmp_path):
    run = RunDir.create(tmp_path)
    run.write_summary(
        {
            "a": torch.tensor(1.5),
            "b": np.float32(0.5),
            "c": math.nan,
            "d": [np.int64(3)],
            "e": tmp_path,
            "f": True,
        }
    )
    json.loads(run.summary.read_text(), parse_constant=pytest.fail)
    assert run.read_summary() == {"a": 1.5, "b": 0.5, "c": None, "d": [3], "e": str(tmp_path), "f": True}
    assert plain({1: (2, math.inf)}) == {"1": [2, None]}


def test_read_jsonl_leaves_out_a_torn_last_line_only(tmp_path):
    path = tmp_path / "x.jsonl"
    assert list(read_jsonl(path)) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a":\n{"a": 2}\n')
    with pytest.raises(RlaifFastError, match=r"x\.jsonl:1 is not valid JSON"):
        list(read_jsonl(path))
    path.write_text("{}\n[]\n")
    with pytest.raises(RlaifFastError, match=r"x\.jsonl:2 holds list"):
        list(read_jsonl(path))


def test_records_are_cut_back_to_the_checkpoint(tmp_path):
    run = RunDir.create(tmp_path)
    write_jsonl(run.metrics, [{"step": step} for step in range(4)])
    length = run.metrics.stat().st_size
    with run.metrics.open("a") as file:
        file.write('{"step": 4}\n{"stage": "eval", "ph')
    write_jsonl(run.samples, [{"phase": "sft"}])
    kept = run.samples.stat().st_size
    with run.samples.open("a") as file:
        file.write('{"phase": "final"}\n')
    run.quarantine.write_text('{"path": "a.mp4"}\n')
    run.predictions("final").write_text("{}\n")
    run.write_summary({})
    run.report.write_text("of four steps")
    run.figures.mkdir()
    (run.figures / "overview.png").write_bytes(b"")
    run.truncate_to({"metrics.jsonl": length, "samples.jsonl": kept, "quarantine.jsonl": 0})
    assert not run.report.exists() and not run.figures.exists()  # else they stand beside what comes next
    assert [row["step"] for row in read_jsonl(run.metrics)] == [0, 1, 2, 3]
    assert [row["phase"] for row in read_jsonl(run.samples)] == ["sft"]
    assert not run.quarantine.exists() and not run.predictions("final").exists() and not run.finished


class Weights(torch.nn.Module):
    """A model of one weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def save_pretrained(self, folder: Path, state_dict: dict | None = None) -> None:
        save_file(state_dict or {"weight": self.weight.data}, folder / "model.safetensors")


class Words:
    """A tokenizer of as many words."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def save_pretrained(self, folder: Path) -> None:
        words = {f"word{index}": index for index in range(self.count)}
        Tokenizer(WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))


@pytest.fixture
def file_limit():
    """Sets the most bytes that a file may have, which is met where a full disk is."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("weights", "words", "state", "reason"),
    [
        (100_000, 1, 1, "File too large.*; raise the limit of file sizes"),
        (1, 100_000, 1, "File too large.*; raise the limit of file sizes"),
        (1, 1, 100_000, "a file was not written to its end; free some space"),
    ],
    ids=["model", "tokenizer", "state"],
)
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, file_limit, weights, words, state, reason):
    store = CheckpointStore(tmp_path, {})
    store.save("rl-000001", Weights(10), Words(), {"step": 1}, last=True)
    file_limit(50_000)
    with pytest.raises(RlaifFastError, match=rf"cannot write checkpoint .*rl-000002: .*{reason}"):
        store.save("rl-000002", Weights(weights), Words(words), {"moments": torch.zeros(state)}, last=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index.json", "rl-000001"]
    assert store.last_state() == {"step": 1}


def test_an_error_that_is_not_the_disks_stays_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Weights, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        CheckpointStore(tmp_path, {}).save("rl-000001", Weights(1), Words(), {}, last=True)
    assert not any(tmp_path.iterdir())


def test_an_index_that_cannot_be_written_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, {})
    store.save("rl-000001", Weights(10), Words(), {"step": 1}, last=True)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_atomically", refuse)
    with pytest.raises(RlaifFastError, match="No space left on device; free some space"):
        store.save("rl-000002", Weights(10), Words(), {"step": 2}, last=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index.json", "rl-000001"]


def test_a_checkpoint_is_on_the_disk_before_the_one_before_is_removed(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, {})
    store.save("rl-000001", Weights(10), Words(), {}, last=True)
    flushed = set()

    def note(handle: int) -> None:
        assert (tmp_path / "rl-000001").is_dir()
        flushed.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    store.save("rl-000002", Weights(10), Words(), {}, last=True)
    written = [tmp_path, tmp_path / "index.json", tmp_path / "rl-000002", *(tmp_path / "rl-000002").iterdir()]
    assert flushed >= {path.stat().st_ino for path in written}
    assert (tmp_path / "rl-000001").exists()  # kept, in case the next one is damaged
    store.save("rl-000003", Weights(10), Words(), {}, last=True)
    assert not (tmp_path / "rl-000001").exists()


def test_a_run_knows_what_it_began_with(tmp_path):
    run = RunDir.create(tmp_path / "run")
    created = run.created
    rows = {"sft": "3 rows, aa", "rl": "32 rows, bb"}
    assert run.began_with("data", rows) == rows
    assert RunDir.open(run.path).began_with("data", {"rl": "8 rows, cc"}) == rows
    assert run.began_with("model", {"config.json": "dd"}) == {"config.json": "dd"}
    assert run.began_with("data", {}) == rows and run.created == created
