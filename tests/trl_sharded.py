"""Trains TRL's trainer on fixed completions and writes what came of it; tests/test_adapters_trl_sharded.py compares.

python tests/trl_sharded.py plain FOLDER
torchrun --nproc_per_node 2 tests/trl_sharded.py fsdp2 FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import trl_oracle

from rlaif_fast.adapters.trl import OracleGRPOTrainer

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RUNS = {
    "dapo": {"loss_type": "dapo", "beta": 0.04},
    "grpo": {"loss_type": "grpo", "beta": 0.0, "num_iterations": 2},
}
generate = OracleGRPOTrainer._generate_single_turn
greedy: list[list[int]] = []


def generate_and_replace(self, prompt_ids, images, multimodal_fields, num_generations, **others):
    """Sample greedily with the real model, note it, and answer words that depend on the row alone."""
    ids, logps = generate(self, prompt_ids, images, multimodal_fields, num_generations, **others)
    greedy.extend(gather_object(ids))
    first, answers = self.accelerator.process_index * len(ids), []
    for row, prompt in enumerate(prompt_ids):
        place = (first + row) % num_generations
        digits = [3 + (sum(prompt) + place * step) % 10 for step in range(1, place + 1)]
        answers.append([*digits, 1][:4])
    return answers, logps


def shard_on_the_cpu() -> None:
    """Accelerate shards only where it has found GPUs: let it take these processes for such."""
    start, choose = PartialState.__init__, AcceleratorState.__init__

    def start_as_gpus(self, *args, **options):
        start(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpus
    AcceleratorState.__init__ = lambda self, *args, **options: choose(
        self, *args, **{**options, "cpu": False}
    )


def main(mode: str, folder: str) -> None:
    OracleGRPOTrainer._generate_single_turn = generate_and_replace
    options = {
        "per_device_train_batch_size": 4 // WORLD, "optim": "sgd", "learning_rate": 0.5,
        "lr_scheduler_type": "constant", "generation_kwargs": {"do_sample": False}, "temperature": 0.7,
        "disable_tqdm": True,
    }  # fmt: skip
    if mode != "plain":
        shard_on_the_cpu()
    if mode == "fsdp2":
        options |= {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
        }
    if mode == "zero3":
        zero = {
            "stage": 3, "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,  # to read the weights at the end
        }  # fmt: skip
        options |= {
            "deepspeed": {
                "zero_optimization": zero,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True,
            },
        }
    results = {}
    for name, run in RUNS.items():
        greedy.clear()
        trainer = trl_oracle.main(f"{folder}/{name}", steps=3, **options, **run)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        results[name] = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "ndcg": [entry[key] for entry in trainer.state.log_history if (key := "rank/reference/ndcg") in entry],
            "kind": type(trainer.model_wrapped).__name__, "greedy": list(greedy), "state": state,
        }  # fmt: skip
    if trainer.accelerator.is_main_process:
        torch.save(results, f"{folder}/results.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
