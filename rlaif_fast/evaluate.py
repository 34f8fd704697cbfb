"""`python -m rlaif_fast.evaluate`: accuracy of a checkpoint by category, on any dataset."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in rlaif_fast.train

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlaif_fast.cli import flag_is_true, parse_config, run_command
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.loading import LoadedModel, ModelOptions, load_model
from rlaif_fast.trainer.options import TrainConfig

FROM_RUN = (
    "media_root",
    "fps",
    "nframes",
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "max_completion_length",
)


@dataclass
class EvaluateConfig:
    """What to evaluate.

    From `media_root` on, null takes the run's value, or without a run what training takes unless told otherwise.

    Attributes:
        run: A run's folder: its best checkpoint is evaluated, with its configuration.
        model: A checkpoint folder, a folder of LoRA adapters or a hub name, in place of the run's.
        data: A JSONL file, in place of the run's test split.
        blank_frames: Replace every frame by grey: what a policy answers that cannot see.
        output: JSONL file for the predictions; null writes none.
        device: "auto", "cpu", "cuda".
        videos_per_step: Videos answered at once.
        debug: Show tracebacks.
        media_root: Folder that relative media paths start from.
        fps: Frames sampled a second.
        nframes: Frames sampled a video, in place of `fps`.
        min_frames: Fewest frames sampled.
        max_frames: Most frames sampled.
        min_pixels: Fewest pixels of a resized frame or image.
        max_pixels: Most pixels of a resized frame or image.
        total_pixels: Most pixels of all frames of a prompt together.
        max_completion_length: Most tokens in an answer.
    """

    run: str | None = None
    model: str | None = None
    data: str | None = None
    blank_frames: bool = False
    output: str | None = None
    device: str = "auto"
    videos_per_step: int = 64
    debug: bool = False
    media_root: str | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.run is None and (self.model is None or self.data is None):
            raise UsageError("evaluate: give --run RUN_DIR, or --model CHECKPOINT and --data FILE.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(argv), debug=flag_is_true(argv, "debug"))


def _run(argv: list[str]) -> int:
    evaluate_command(parse_config(EvaluateConfig, argv, prog="rlaif_fast.evaluate", description=__doc__))
    return 0


def evaluate_command(options: EvaluateConfig) -> dict:
    """Evaluate as configured, print the table, and return {"accuracy", "by_category", "chance"}."""
    import torch

    from rlaif_fast.data import chance_by_category, read_examples
    from rlaif_fast.rollout import make_sampler
    from rlaif_fast.runs.folder import write_jsonl
    from rlaif_fast.trainer import datasets, setup
    from rlaif_fast.trainer.evaluation import evaluate
    from rlaif_fast.trainer.scoring import scorer_by_name

    config = configuration(options)
    known = None
    if options.data is not None:
        rows = read_examples(Path(options.data).expanduser(), media_root=config.media_root)
    else:
        data = datasets.load_data(config)
        rows, known = data.test, data.rl
    loaded = load_checkpoint(config)
    policy = setup.make_policy(loaded, config)
    policy.model.eval()
    with (
        torch.no_grad(),
        setup.make_batch_maker(loaded, config, blank_frames=options.blank_frames) as make_batch,
    ):
        result = evaluate(
            rows,
            make_batch,
            make_sampler(policy),
            scorer=scorer_by_name(
                config.oracle, setup.for_reasoning(config, make_batch.encoder)[0].oracle_options
            ),
            max_new_tokens=config.max_completion_length,
            videos_per_step=options.videos_per_step,
        )
    if not result.by_category():
        raise UsageError("evaluate: no row has a reference answer, so accuracy cannot be measured")
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
                    "correct": p.correct,
                }
                for p in result.predictions
            ),
        )
    figures = {"accuracy": result.accuracy, "by_category": result.by_category(), "chance": chance}
    print_table(figures)
    return figures


def configuration(options: EvaluateConfig) -> TrainConfig:
    """The run's configuration with what the command changes; its `model` is the checkpoint to evaluate."""
    from rlaif_fast.runs.checkpoint import CheckpointStore
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.trainer.resume import saved_config

    config = TrainConfig()
    given = {name: value for name in ("model", *FROM_RUN) if (value := getattr(options, name)) is not None}
    if options.run is not None:
        run_dir = RunDir.open(options.run)
        config = saved_config(run_dir)
        best = CheckpointStore(run_dir.checkpoints, {}, read_only=True).checked("best")
        given = {"model": str(best)} | given
    return dataclasses.replace(config, device=options.device, **given)


def load_checkpoint(config: TrainConfig) -> LoadedModel:
    """Load the model of the configuration; LoRA adapters are merged into the model they were trained on.

    Raises:
        UsageError: It cannot be loaded, or the adapters' base model cannot.
    """
    usual = ModelOptions()
    config = dataclasses.replace(
        config,
        lora_r=0,
        lora_alpha=usual.lora_alpha,
        lora_dropout=usual.lora_dropout,
        lora_modules=usual.lora_modules,
        lora_target_modules=usual.lora_target_modules,
        train_router=False,
        gradient_checkpointing=False,
        freeze_vision_tower=None,
        freeze_projector=None,
        freeze_language_model=None,
    )
    return load_model(config)


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
