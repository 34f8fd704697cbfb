"""`python -m rlaif_fast.evaluate`: accuracy of a checkpoint by category, on any dataset or published benchmark."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in rlaif_fast.train

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_fast.cli import flag_is_true, is_first, parse_config, run_command, tell
from rlaif_fast.errors import UsageError, require
from rlaif_fast.evals.options import EvaluateConfig, configuration, load_checkpoint
from rlaif_fast.outputs import check_output
from rlaif_fast.policy.model_files import model_files
from rlaif_fast.trainer.options import TrainConfig

if TYPE_CHECKING:
    from rlaif_fast.data.schema import Example
    from rlaif_fast.distributed.world import World
    from rlaif_fast.trainer.evaluation import EvalResult


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(argv), debug=flag_is_true(argv, "debug"), flag="--debug true")


def _run(argv: list[str]) -> int:
    options = parse_config(EvaluateConfig, argv, prog="rlaif_fast.evaluate", description=__doc__)
    if not is_first():  # each reads the same rows
        logging.getLogger("rlaif_fast.data").setLevel(logging.ERROR)
    if options.benchmark is None:
        evaluate_command(options)
    else:
        from rlaif_fast.evals.command import evaluate_benchmark

        evaluate_benchmark(options)
    return 0


def evaluate_command(options: EvaluateConfig) -> dict:
    """Evaluate as configured, print the table, and return {"accuracy", "by_category", "chance"}.

    Of several processes the first does so; the others return nothing.
    """
    from rlaif_fast.data import chance_by_category
    from rlaif_fast.distributed.launch import RankZeroFirst, launch
    from rlaif_fast.policy.loading import resolve_device
    from rlaif_fast.runs.files import write_jsonl

    output = None if options.output is None else check_output("output", options.output, [options.data])
    config = configuration(options, tell)
    if output is not None:
        check_output("output", output, model_files(Path(config.model).expanduser()))
    # Accuracy needs reference answers; with `output`, the model's own answers may be all that is wanted.
    with RankZeroFirst().turn():
        rows, known = _rows(options, config, require_answer=output is None)
    if output is not None:
        check_output("output", output, [medium.path for row in rows for medium in row.seen])
    work = (options, config, rows)
    result, unread = launch(_answers_in, work, options.num_processes, resolve_device(options.device))
    if not is_first():
        return {}
    if not result.predictions:
        raise UsageError(f"evaluate: none of the {len(rows)} rows could be answered: {unread}")
    if len(result.predictions) < len(rows):
        tell(
            f"left out: {len(rows) - len(result.predictions)} of {len(rows)} rows, whose media cannot be read: {unread}"
        )
    if not result.by_category() and output is None:
        raise UsageError("evaluate: no row has a reference answer, so accuracy cannot be measured")
    chance = chance_by_category(rows, reference=known)
    if output is not None:
        write_jsonl(
            output,
            (
                {
                    "example_id": p.example.id,
                    "category": p.example.category,
                    "prediction": p.text,
                    "answer": p.example.answer,
                    "correct": p.correct,
                    "finished": p.finished,
                }
                for p in result.predictions
            ),
        )
    figures = {"accuracy": result.accuracy, "by_category": result.by_category(), "chance": chance}
    if figures["by_category"]:
        print_table(figures)
    else:
        print(
            f"{options.output}: {len(result.predictions)} answers; no row has a reference answer to measure by"
        )
    return figures


def _rows(
    options: EvaluateConfig, config: TrainConfig, *, require_answer: bool
) -> tuple[Sequence[Example], Sequence[Example] | None]:
    """The rows to answer, and those that the run learned from; None without a run."""
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.trainer import datasets
    from rlaif_fast.trainer.inputs import refuse_other_test

    if options.data is not None:
        file = Path(options.data).expanduser()
        return datasets.read_file(file, config, require_answer=require_answer), None
    if options.media_root is not None and config.data == "synthetic":
        require(
            config.test_data is not None,
            "media_root",
            "null where the run's data are synthetic",
            options.media_root,
        )
    assert options.run is not None
    data = datasets.load_data(config)
    refuse_other_test(RunDir.open(options.run), data.test)
    return data.test, data.rl


def _answers_in(
    world: World, work: tuple[EvaluateConfig, TrainConfig, Sequence[Example]]
) -> tuple[EvalResult, str]:
    """The checkpoint's answers, and which media could not be read: this process's part, then everyone's."""
    import torch

    from rlaif_fast.rollout import make_sampler
    from rlaif_fast.trainer import setup
    from rlaif_fast.trainer.evaluation import evaluate
    from rlaif_fast.trainer.scoring import scorer_by_name

    options, config, rows = work
    setup.set_threads(config.threads, world.local_size)
    loaded = load_checkpoint(config)
    policy = setup.make_policy(loaded, config)
    policy.model.eval()
    make_batch = setup.make_batch_maker(loaded, config, blank_frames=options.blank_frames)
    with torch.no_grad(), make_batch:
        told, _ = setup.for_reasoning(config, make_batch.encoder)
        result = evaluate(
            rows,
            make_batch,
            make_sampler(policy),
            scorer=scorer_by_name(config.oracle, told.oracle_options, reasons=make_batch.encoder.reasons),
            max_new_tokens=config.max_completion_length,
            max_reasoning_tokens=config.max_reasoning_tokens,
            videos_per_step=options.videos_per_step,
            world=world,
        )
        stats = make_batch.store.stats
        for files in world.gather(stats.bad_files):
            stats.bad_files |= files
        return result, stats.summary()


def print_table(figures: dict) -> None:
    """Accuracy and the accuracy of blind guessing, by category."""
    from rlaif_fast.data.schema import named_categories

    by_category, chance = figures["by_category"], figures["chance"]
    width = max(map(len, ["category", *by_category]))
    print(f"{'category':<{width}}  accuracy  chance      n")
    rows = {name: {**row, "chance": chance[name]} for name, row in by_category.items()}
    for name, row in named_categories(rows).items():
        print(f"{name:<{width}}  {row['accuracy']:8.3f}  {row['chance']:6.3f}  {row['n']:5d}")
    total = sum(row["n"] for row in by_category.values())
    blind = sum(chance[name] * row["n"] for name, row in by_category.items()) / max(total, 1)
    print(f"{'all':<{width}}  {figures['accuracy']:8.3f}  {blind:6.3f}  {total:5d}")
    print(json.dumps({"accuracy": figures["accuracy"], "chance": blind, "n": total}))


if __name__ == "__main__":
    sys.exit(main())
