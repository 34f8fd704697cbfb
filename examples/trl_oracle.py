"""TRL's GRPO trainer, taught by an oracle: sums of two digits, on any machine.

python examples/trl_oracle.py
accelerate launch --num_processes 2 --cpu examples/trl_oracle.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny_text_model
from datasets import Dataset
from trl import GRPOConfig

from rlaif_fast.adapters.trl import OracleGRPOTrainer
from rlaif_fast.oracle import ReferenceOracle


def main(
    output_dir: str = "trl_oracle_run", steps: int = 6, peft_config=None, **options
) -> OracleGRPOTrainer:
    """Train a few steps and return the trainer; with a `peft_config` only adapters. `options` go to `GRPOConfig`."""
    sums = [
        {"prompt": f"how many is {a} plus {b} ?", "reference": str(a + b)} for a in range(5) for b in range(5)
    ]
    tiny = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": 4, "learning_rate": 1e-3, "beta": 0.04, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    args = GRPOConfig(output_dir=output_dir, max_steps=steps, **{**tiny, **options})
    start = Path(output_dir) / "start"
    with args.main_process_first():
        model = str(start) if start.exists() else tiny_text_model.save(start)
    trainer = OracleGRPOTrainer(
        model,
        ReferenceOracle(),
        args=args,
        train_dataset=Dataset.from_list(sums),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
