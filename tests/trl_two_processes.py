"""What two processes of TRL that share every group agree on; run by tests/test_adapters_trl.py under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.utils import gather

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import trl_oracle

from rlaif_fast.adapters.trl import OracleGRPOTrainer
from rlaif_fast.oracle import ReferenceOracle

asked: list[tuple[int, set[str]]] = []
generate = OracleGRPOTrainer._generate_and_score_completions
rank = ReferenceOracle.rank


def rank_and_note(self, requests):
    asked.extend((len(request.responses), {request.question}) for request in requests)
    return rank(self, requests)


def generate_and_check(self, inputs):
    output = generate(self, inputs)
    sums = gather(output["advantages"]).view(-1, self.num_generations).sum(dim=1)
    assert sums.abs().max() < 1e-5, sums
    return output


ReferenceOracle.rank = rank_and_note
OracleGRPOTrainer._generate_and_score_completions = generate_and_check
trainer = trl_oracle.main(sys.argv[1], steps=6, per_device_train_batch_size=2)
assert trainer.state.global_step == 6
main_process = trainer.accelerator.is_main_process
assert bool(asked) == main_process, "only the main process asks the oracle"
assert all(size == trainer.num_generations for size, _ in asked)
first = next(trainer.model.parameters()).detach().flatten()[:8]
both = gather(first).view(2, -1)
assert torch.equal(both[0], both[1]), "the replicas differ"
if main_process:
    print("two processes agree")
trainer.accelerator.end_training()
