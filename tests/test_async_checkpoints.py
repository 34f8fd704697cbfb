"""Checkpoints that are written while the run goes on: what they hold, and what is left where one is not written."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run_dir import Words, file_limit  # noqa: F401
from tiny_runs import SMALL, metrics
from torch.distributed import checkpoint
from vllm_parts import LORA

from rlaif_fast import train as train_module
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.policy.parts import add_lora
from rlaif_fast.policy.testing import make_model
from rlaif_fast.runs.background import copied, copied_weights
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.sharded import FOLDER, read_shards


class Weights(torch.nn.Module):
    """A model of one weight, which is written once `go_on` is set."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.go_on = threading.Event()

    def save_pretrained(self, folder, state_dict) -> None:
        assert self.go_on.wait(60)
        save_file(state_dict, folder / "model.safetensors")


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path):
    store, model, moments = CheckpointStore(tmp_path, {}, asynchronous=True), Weights(), torch.zeros(3)
    store.save("one", model, Words(), {"step": 1, "nested": [{"moments": moments}]}, last=True)
    with torch.no_grad():
        model.weight.add_(1)
        moments.add_(1)
    assert not (tmp_path / "one").exists()
    model.go_on.set()
    assert store.index.last == "one"  # asking waits
    assert load_file(tmp_path / "one/model.safetensors")["weight"].tolist() == [0.0] * 4
    assert store.last_state()["nested"][0]["moments"].tolist() == [0.0] * 3


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path):
    store, first = CheckpointStore(tmp_path, {}, asynchronous=True), Weights()
    store.save("one", first, Words(), {}, last=True)
    second = Weights()
    second.go_on.set()
    saving = threading.Thread(target=store.save, args=("two", second, Words(), {}), kwargs={"last": True})
    saving.start()
    first.go_on.set()
    saving.join()
    assert store.index.last == "two" and store.index.order == 2
    assert list(store.index.recent) == ["two", "one"]


def test_a_full_disk_is_told_by_whoever_waits_and_leaves_the_checkpoints_before(tmp_path, file_limit):  # noqa: F811
    store, small, large = CheckpointStore(tmp_path, {}, asynchronous=True), Weights(), Weights(100_000)
    for model in (small, large):
        model.go_on.set()
    store.save("one", small, Words(), {"step": 1}, last=True)
    store.wait()
    for told in (store.wait, lambda: store.index, lambda: store.save("three", small, Words(), {}, last=True)):
        file_limit(50_000)
        store.save("two", large, Words(), {}, last=True)
        with pytest.raises(RlaifFastError, match=r"cannot write checkpoint .*two: .*File too large"):
            told()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index.json", "one"]
    assert store.last_state() == {"step": 1}


def test_copies_share_no_memory_and_tied_weights_stay_tied():
    model = make_model("qwen3_vl")
    weights = copied_weights(model)
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight) and weights[name].data_ptr() != weight.data_ptr()
    assert weights["lm_head.weight"] is weights["model.language_model.embed_tokens.weight"]
    assert copied((1, {"a": None})) == (1, {"a": None})


def test_of_lora_the_adapters_are_copied():
    model = add_lora(make_model("qwen3_vl"), LORA)
    weights = copied_weights(model)
    assert weights and all(".lora_" in name for name in weights)


# --- the run ---------------------------------------------------------------------------------------------------

# The command, which ends as by SIGKILL when the given checkpoint is written but for its manifest.
KILLED = """
import os, sys
from rlaif_fast.runs import checkpoint
from rlaif_fast.train import main
write = checkpoint.write_manifest
def write_or_die(folder, manifest):
    if folder.name == f".{sys.argv[1]}.partial":
        os._exit(9)
    write(folder, manifest)
checkpoint.write_manifest = write_or_die
sys.exit(main(sys.argv[2:]))
"""


def words(folder, cache, **changes):
    values = SMALL | {"output_dir": folder, "cache_dir": cache, "sft_steps": 2, "eval_steps": 1} | changes
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that waits for each of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_module.main(words(folder, cache)) == 0
    return folder


def same_weights(ours, expected) -> bool:
    files = sorted(path.relative_to(expected) for path in expected.glob("checkpoints/*/model.safetensors"))
    assert len(files) >= 2
    return all((ours / file).read_bytes() == (expected / file).read_bytes() for file in files)


def test_a_run_ends_alike_whether_it_waits_or_not(whole, cache, tmp_path):
    assert train_module.main(words(tmp_path / "run", cache, async_checkpoints="true")) == 0
    assert metrics(tmp_path / "run") == metrics(whole)
    assert same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["sft", "rl-000001", "rl-000003"])
def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(whole, cache, tmp_path, name):
    arguments = words(tmp_path / "run", cache, async_checkpoints="true")
    done = subprocess.run([sys.executable, "-c", KILLED, name, *arguments], timeout=600, check=False)
    assert done.returncode == 9
    assert not (tmp_path / "run/checkpoints" / name).exists()
    assert train_module.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(whole)
    assert same_weights(tmp_path / "run", whole)


@pytest.mark.filterwarnings("error:torch.distributed is disabled")
def test_one_process_reads_shards_without_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        checkpoint.save({"weight": torch.arange(3.0)}, checkpoint_id=tmp_path / FOLDER, no_dist=True)
    found = {"weight": torch.zeros(3)}
    read_shards(tmp_path, found)
    assert found["weight"].tolist() == [0.0, 1.0, 2.0]
