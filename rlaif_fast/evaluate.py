"""`python -m rlaif_fast.evaluate`: accuracy of a checkpoint by category, on any dataset."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in rlaif_fast.train

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlaif_fast.cli import parse_config, run_command
from rlaif_fast.errors import UsageError
from rlaif_fast.trainer.options import TrainConfig


@dataclass
class EvaluateConfig:
    """What to evaluate.

    Attributes:
        run: A run's folder: its best checkpoint is evaluated, with its configuration.
        model: A checkpoint folder or hub name, in place of the run's.
        data: A JSONL file, in place of the run's test split.
        blank_frames: Replace every frame by grey: what a policy answers that cannot see.
        output: JSONL file for the predictions; null writes none.
        device: "auto", "cpu", "cuda".
        videos_per_step: Videos answered at once.
        max_completion_length: Most tokens in an answer; null takes the run's.
        debug: Show tracebacks.
    """

    run: str | None = None
    model: str | None = None
    data: str | None = None
    blank_frames: bool = False
    output: str | None = None
    device: str = "auto"
    videos_per_step: int = 64
    max_completion_length: int | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if self.run is None and (self.model is None or self.data is None):
            raise UsageError("evaluate: give --run RUN_DIR, or --model CHECKPOINT and --data FILE.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    evaluate_command(parse_config(EvaluateConfig, argv, prog="rlaif_fast.evaluate", description=__doc__))
    return 0


def evaluate_command(options: EvaluateConfig) -> dict:
    """Evaluate as configured, print the table, and return {"accuracy", "by_category", "chance"}."""
    import torch

    from rlaif_fast.data import chance_by_category, read_examples
    from rlaif_fast.policy.loading import load_model
    from rlaif_fast.rollout import make_sampler
    from rlaif_fast.trainer import setup
    from rlaif_fast.trainer.checkpoint import CheckpointStore
    from rlaif_fast.trainer.evaluation import evaluate
    from rlaif_fast.trainer.resume import saved_config
    from rlaif_fast.trainer.run_dir import RunDir, write_jsonl

    config = TrainConfig()
    if options.run is not None:
        run_dir = RunDir.open(options.run)
        config = saved_config(run_dir)
        config.model = str(CheckpointStore(run_dir.checkpoints, {}).path("best"))
    if options.model is not None:
        config.model = options.model
    config.device = options.device
    known = None
    if options.data is not None:
        rows = read_examples(Path(options.data).expanduser(), media_root=config.media_root)
    else:
        data = setup.load_data(config)
        rows, known = data.test, data.rl
    loaded = load_model(config)
    policy = setup.make_policy(loaded, config)
    with (
        torch.no_grad(),
        setup.make_batch_maker(loaded, config, blank_frames=options.blank_frames) as make_batch,
    ):
        result = evaluate(
            rows,
            make_batch,
            make_sampler(policy),
            max_new_tokens=options.max_completion_length or config.max_completion_length,
            videos_per_step=options.videos_per_step,
        )
    chance = chance_by_category(rows, reference=known)
    if options.output is not None:
        write_jsonl(
            Path(options.output),
            (
                {
                    "example_id": p.example.id,
                    "category": p.example.category,
                    "prediction": p.text,
                    "answer": p.example.answer,
                    "correct": bool(p.correct),
                }
                for p in result.predictions
            ),
        )
    figures = {"accuracy": result.accuracy, "by_category": result.by_category(), "chance": chance}
    print_table(figures)
    return figures


def print_table(figures: dict) -> None:
    """Accuracy and the accuracy of blind guessing, by category."""
    by_category, chance = figures["by_category"], figures["chance"]
    width = max(map(len, [*by_category, "all"]))
    print(f"{'category':<{width}}  accuracy  chance      n")
    for name, row in by_category.items():
        print(f"{name:<{width}}  {row['accuracy']:8.3f}  {chance[name]:6.3f}  {row['n']:5d}")
    total = sum(row["n"] for row in by_category.values())
    blind = sum(chance[name] * row["n"] for name, row in by_category.items()) / max(total, 1)
    print(f"{'all':<{width}}  {figures['accuracy']:8.3f}  {blind:6.3f}  {total:5d}")
    print(json.dumps({"accuracy": figures["accuracy"], "chance": blind, "n": total}))


if __name__ == "__main__":
    sys.exit(main())
