"""TRL's trainer on two processes that share out the parameters: what it learns is what one process learns."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlaif-fast[adapters-test]'")

import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rlaif_fast.adapters import trl_loss

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "tests/trl_sharded.py")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tiny_text_model

    return tiny_text_model


def trained(mode: str, folder: Path, processes: int) -> dict:
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, mode, str(folder)],
        capture_output=True, text=True, timeout=1500, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained("plain", tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode, kind", [("fsdp2", "FSDPQwen3ForCausalLM"), ("zero3", "DeepSpeedEngine")])
def test_two_processes_learn_what_one_learns(alone, tiny, tmp_path, mode, kind):
    if mode == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    shared, start = trained(mode, tmp_path / "run", 2), tiny.model().state_dict()
    for name, expected in alone.items():
        run = shared[name]
        assert run["kind"] == kind
        assert run["greedy"] == expected["greedy"]  # the sharded model writes what the whole one writes
        assert run["ndcg"] == pytest.approx(expected["ndcg"], abs=1e-6)
        assert run["losses"] == pytest.approx(expected["losses"], abs=1e-6, rel=1e-5)
        assert max(map(abs, run["losses"])) > 1e-3
        assert run["state"].keys() == expected["state"].keys()
        for key, weight in expected["state"].items():
            torch.testing.assert_close(run["state"][key], weight, rtol=1e-5, atol=1e-6)
        assert (expected["state"]["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-2


def test_mixed_precision_leaves_the_log_probabilities_alone(tiny, tmp_path, monkeypatch):
    """FSDP2 rounds floats among the arguments of a forward; a log-probability of -20.01 would become -20."""
    seen, loss = {}, trl_loss.fused_linear_grpo_rank_loss

    def note(hidden, weight, **arguments):
        seen.update(arguments, hidden=hidden, weight=weight)
        return loss(hidden, weight, **arguments)

    monkeypatch.setattr(trl_loss, "fused_linear_grpo_rank_loss", note)
    model = tiny.model()
    trl_loss.add_rank_loss(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        ids, old = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-20.01, -3.003]])
        arguments = {
            "token_ids": ids[:, 2:], "mask": torch.ones(1, 2), "advantages": torch.tensor([-1.001]),
            "old_logps": old, "num_items_in_batch": 2, "loss_type": "dapo", "beta": 0.0,
        }  # fmt: skip
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            rank_loss=trl_loss.SealedArguments(arguments),
        ).loss.backward()
    finally:
        dist.destroy_process_group()
    assert seen["hidden"].dtype == seen["weight"].dtype == torch.bfloat16
    torch.testing.assert_close(seen["old_logps"], old, rtol=0, atol=0)
    torch.testing.assert_close(seen["advantages"], torch.tensor([-1.001]), rtol=0, atol=0)
    assert model.lm_head.weight.grad.full_tensor().any()
