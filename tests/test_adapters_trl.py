"""The oracle in TRL's real GRPO trainer, and our loss against TRL's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlaif-fast[adapters-test]'")


from rlaif_fast import rank_advantages
from rlaif_fast.adapters import parity
from rlaif_fast.adapters.trl import OracleGRPOTrainer
from rlaif_fast.oracle import ReferenceOracle

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return parity.trl_trainer(str(tmp_path_factory.mktemp("trainer")))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import trl_oracle

    return trl_oracle


@pytest.mark.parametrize("feature", parity.FEATURES)
def test_the_loss_and_its_gradients_are_trls(tiny, feature):
    errors = parity.trl_errors(feature, tiny)
    assert errors.loss <= 1e-6
    assert errors.gradients <= 2e-6


@pytest.mark.parametrize("feature", ["grpo", "dapo", "cispo", "sapo", "entropy bonus"])
def test_the_statistics_are_trls(tiny, feature):
    metrics = tiny._metrics["train"]
    metrics.clear()
    parity.trl_errors(feature, tiny)
    theirs = {name: values[0] for name, values in metrics.items()}
    assert theirs.keys() == metrics.keys() and all(len(values) == 2 for values in metrics.values())
    assert {name: values[1] for name, values in metrics.items()} == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_six_steps_with_advantages_of_the_ranks(example, tmp_path, monkeypatch):
    rankings, batches = [], []
    rank, generate = ReferenceOracle.rank, OracleGRPOTrainer._generate_and_score_completions

    def rank_and_note(self, requests):
        rankings.append(rank(self, requests))
        return rankings[-1]

    def generate_and_check(self, inputs):
        output = generate(self, inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=attention).logits
        length = output["completion_ids"].shape[1]
        logps = logits[:, -length - 1 : -1].log_softmax(-1)
        logps = logps.gather(-1, output["completion_ids"][..., None])[..., 0]
        mask = output["completion_mask"]
        scores = ((logps * mask).sum(1) / mask.sum(1)).view(-1, self.num_generations)
        ranks = torch.tensor([ranking.ranks for ranking in rankings[-1]])
        batches.append((output["advantages"], rank_advantages(scores, ranks).advantages.flatten()))
        return output

    monkeypatch.setattr(ReferenceOracle, "rank", rank_and_note)
    monkeypatch.setattr(OracleGRPOTrainer, "_generate_and_score_completions", generate_and_check)
    trainer = example.main(str(tmp_path), steps=6)
    assert trainer.state.global_step == 6
    assert len(batches) == 6
    for advantages, expected in batches:
        assert advantages.any()
        torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    logs = [entry for entry in trainer.state.log_history if "rank/reference/ndcg" in entry]
    assert len(logs) == 6
    assert all(0.0 < entry["rank/reference/ndcg"] <= 1.0 + 1e-6 for entry in logs)
    assert all(entry["rank/reference/judged"] == 1.0 and entry["kl"] >= 0.0 for entry in logs)
    assert not any(name == "reward" or name.startswith("rewards/") for entry in logs for name in entry)


def test_adapters_alone_learn(example, tmp_path, monkeypatch):
    """Under PEFT the base stays as it was, and the reference is the model without adapters."""
    from peft import LoraConfig

    before, compared = {}, []
    generate = OracleGRPOTrainer._generate_and_score_completions

    def generate_and_note(self, inputs):
        if not before:
            before.update({name: x.detach().clone() for name, x in self.model.named_parameters()})
        output = generate(self, inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length = output["completion_ids"].shape[1]
        with torch.no_grad(), self.model.disable_adapter():
            logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids, attention, length)
        mask = output["completion_mask"].bool()
        compared.append((output["ref_per_token_logps"][mask], logps[mask]))
        return output

    monkeypatch.setattr(OracleGRPOTrainer, "_generate_and_score_completions", generate_and_note)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    trainer = example.main(str(tmp_path), steps=3, peft_config=lora)
    moved = {name for name, x in trainer.model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(compared) == 3
    for reference, bare in compared:
        torch.testing.assert_close(reference, bare, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", ["grpo", "dapo", "sequence level", "beta 0"])
def test_the_loss_and_the_gradients_of_adapters_are_trls(tmp_path, feature):
    from peft import LoraConfig

    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    trainer = parity.trl_trainer(str(tmp_path), lora)
    errors = parity.trl_errors(feature, trainer)
    assert errors.loss <= 1e-6
    assert errors.gradients <= 2e-6


@pytest.mark.slow
def test_two_processes_share_a_group(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/trl_two_processes.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "two processes agree" in done.stdout
