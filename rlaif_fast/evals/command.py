"""`python -m rlaif_fast.evaluate --benchmark NAME`: a published benchmark, its tables and its bar chart."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_fast.cli import tell
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.evals.options import FROM_RUN, EvaluateConfig, configuration, load_checkpoint
from rlaif_fast.trainer.options import TrainConfig

if TYPE_CHECKING:
    from rlaif_fast.data.benchmarks import Item
    from rlaif_fast.evals.records import EvalFolder, Record
    from rlaif_fast.evals.runner import IsRight
    from rlaif_fast.oracle.base import RankRequest


def evaluate_benchmark(options: EvaluateConfig) -> Path:
    """Answer the benchmark, print its table, and return the folder of the results.

    Raises:
        UsageError: The benchmark's files, the model, the judge or the results folder cannot be used.
        RlaifFastError: The judge graded no answer at all.
    """
    from rlaif_fast.distributed.launch import RankZeroFirst, launch
    from rlaif_fast.evals.records import EvalFolder, read_records
    from rlaif_fast.evals.tables import refuse_other_questions
    from rlaif_fast.policy.loading import resolve_device

    items = _items(options)
    check_read(options, [item.example for item in items])
    if all(item.trouble for item in items):
        raise UsageError(f"data: none of the {len(items)} questions can be asked: {items[0].trouble}")
    before = None if options.before is None else read_records(options.before)
    if before is not None:
        asked = {item.example.id: (item.example.question, item.example.answer) for item in items}
        refuse_other_questions(before, asked)
    path = _results(options)
    first = RankZeroFirst()
    with contextlib.ExitStack() as held:
        settings: dict[str, Any] = {}
        with first.turn():
            if first.rank == 0:
                settings = _begin(options, items, held)
        work = (options, settings, items)
        launch(_evaluate_in, work, options.num_processes, resolve_device(options.device))
        if first.rank == 0:
            _conclude(options, items, before, EvalFolder.open(path, settings))
    return path


def _items(options: EvaluateConfig) -> list[Item]:
    from rlaif_fast.data.benchmarks import read_benchmark
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.trainer.resume import saved_config

    assert options.benchmark is not None and options.data is not None
    run = TrainConfig() if options.run is None else saved_config(RunDir.open(options.run))
    return read_benchmark(
        options.benchmark,
        options.data,
        subtitles=options.subtitles,
        limit=options.limit,
        scored=run.scored_answer,
    )


def _results(options: EvaluateConfig) -> Path:
    return Path(options.output_dir or f"evals/{options.benchmark}").expanduser()


def _begin(options: EvaluateConfig, items: Sequence[Item], held: contextlib.ExitStack) -> dict[str, Any]:
    """Make the results folder, or check that the evaluation can continue there; `held` keeps others out of it.

    Returns:
        The settings of the evaluation.
    """
    from rlaif_fast.evals.records import EvalFolder, scored_otherwise
    from rlaif_fast.runs.folder import RunDir

    settings = settings_of(options, configuration(options, tell))
    folder = EvalFolder.open(_results(options), settings)
    held.enter_context(RunDir(folder.path).lock())
    folder.refuse_other_questions(item.example for item in items)
    if options.before is not None and (other := scored_otherwise(options.before, settings)):
        tell(f"before: {options.before} has other {' and '.join(other)}, which is part of the change")
    return settings


def _conclude(
    options: EvaluateConfig, items: Sequence[Item], before: Sequence[Record] | None, folder: EvalFolder
) -> None:
    """Ask for missing grades, write the tables, and print the results.

    Raises:
        UsageError: No question could be answered.
        RlaifFastError: The judge graded no answer at all.
    """
    from rlaif_fast.data.benchmarks import BENCHMARKS
    from rlaif_fast.evals.grading import make_grader
    from rlaif_fast.evals.runner import grade_rest
    from rlaif_fast.evals.tables import as_text, table_of, write_tables

    assert options.benchmark is not None
    path, ungraded = folder.path, 0
    if options.judge is not None:
        ungraded = grade_rest(items, folder, make_grader(options.judge, options.judge_options))
    records = [folder.records[item.example.id] for item in items]
    if all(record.prediction is None for record in records):
        raise UsageError(
            f"data: none of the {len(records)} questions could be answered: {records[0].trouble}; "
            f"{path / 'items.jsonl'} has the reason of each"
        )
    for_judge = {item.example.id for item in items if options.judge is not None and not item.example.options}
    lines = table_of(records, before, for_judge)
    write_tables(
        path, lines, records, f"{options.benchmark}: accuracy by {BENCHMARKS[options.benchmark].category}"
    )
    print(as_text(lines))
    unanswered = [record for record in records if record.prediction is None]
    for record in unanswered[:10]:
        print(f"question {record.id} is unanswered and counts as wrong: {record.trouble}")
    if len(unanswered) > 10:
        print(f"... and {len(unanswered) - 10} more; all are in {path / 'summary.json'}")
    if ungraded:
        print(f"not graded by the judge: {ungraded} answers; the same command asks for them again")
    print(
        json.dumps({"accuracy": lines[0].accuracy.mean, "n": lines[0].n, "unanswered": lines[0].unanswered})
    )
    if ungraded and not lines[0].judged:
        raise RlaifFastError(
            f"judge: {options.judge} graded none of {ungraded} answers; they are kept in {path}, and the same command "
            "asks for the grades again"
        )


def check_read(options: EvaluateConfig, examples: Sequence[Example]) -> None:
    """Refuse options that no question of the benchmark uses.

    Raises:
        UsageError: No open question for the judge, no choice for `answering`, or no text for `max_completion_length`.
    """
    open_ended = any(not example.options for example in examples)
    if options.judge is not None and not open_ended:
        raise UsageError("judge: it grades open questions, and every question here has options; leave it out")
    if options.answering == "generate":
        return
    if not any(example.options for example in examples):
        raise UsageError(
            "answering: it is of multiple choice, and no question here has options; leave it out"
        )
    if options.max_completion_length is not None and not open_ended:
        raise UsageError(
            f"max_completion_length: not read where answering is {options.answering} and every question has "
            "options; leave it out"
        )


def settings_of(options: EvaluateConfig, config: TrainConfig) -> dict[str, Any]:
    """What an answer depends on; an evaluation continues only if all of it is unchanged.

    Args:
        options: The options of the command.
        config: Their `configuration`; its model's files are read.
    """
    from rlaif_fast.evals.identity import model_digest
    from rlaif_fast.trainer.scoring import SCORING, rules

    # Left out because items that were not read in time are asked again.
    shown = [name for name in FROM_RUN if name not in ("decode_workers", "decode_timeout")]
    names = (
        "benchmark",
        "data",
        "run",
        "model",
        "answering",
        "subtitles",
        "judge",
        "judge_options",
        "blank_frames",
    )
    return {name: getattr(options, name) for name in names} | {
        "model": config.model,
        "weights": model_digest(config.model),
        "scoring": SCORING,
        "rules": rules(config.oracle_options).identity,
        **{
            name: getattr(config, name) for name in ("dtype", "system_prompt", "max_reasoning_tokens", *shown)
        },
    }


def _evaluate_in(world, work: tuple[EvaluateConfig, dict[str, Any], Sequence[Item]]) -> None:
    """One process's part of an evaluation: what to evaluate, in rank 0 its settings, and the questions."""
    import torch

    from rlaif_fast.data.benchmarks import BENCHMARKS
    from rlaif_fast.evals.answering import answer
    from rlaif_fast.evals.grading import make_grader
    from rlaif_fast.evals.records import EvalFolder
    from rlaif_fast.evals.runner import run_items
    from rlaif_fast.rollout import make_sampler
    from rlaif_fast.trainer import setup

    options, settings, items = work
    assert options.benchmark is not None
    # A bad file counts as an unanswered question, however many there are.
    config = dataclasses.replace(configuration(options), max_bad_fraction=1.0)
    setup.set_threads(config.threads, world.local_size)
    folder = EvalFolder.open(_results(options), settings) if world.is_main else None
    grader = None if options.judge is None else make_grader(options.judge, options.judge_options)
    loaded = load_checkpoint(config)
    policy = setup.make_policy(loaded, config)
    policy.model.eval()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if world.is_main:
            print(f"{options.benchmark}: {done}/{len(items)} questions", flush=True)

    with (
        torch.no_grad(),
        setup.make_batch_maker(loaded, config, blank_frames=options.blank_frames) as make_batch,
    ):
        setup.for_reasoning(config, make_batch.encoder)  # refuses a bound that this model cannot keep
        sampler = make_sampler(policy)

        def answers(prompts):
            lengths = (config.max_completion_length, config.max_reasoning_tokens)
            return answer(policy, make_batch.encoder, sampler, prompts, options.answering, *lengths)

        run_items(
            items,
            folder,
            make_batch,
            answers,
            category=BENCHMARKS[options.benchmark].category,
            is_right=_is_right(options, config, reasons=make_batch.encoder.reasons),
            grader=grader,
            reasons=make_batch.encoder.reasons and "extract" not in options.judge_options,
            videos_per_step=options.videos_per_step,
            world=world,
            advance=advance,
        )


def _is_right(options: EvaluateConfig, config: TrainConfig, *, reasons: bool) -> IsRight:
    """The rules that decide whether an answer to a request is right.

    A chosen letter is the whole answer; a generated answer may contain more.
    """
    from rlaif_fast.trainer.scoring import rules

    written, chosen = rules(config.oracle_options, reasons=reasons), rules({})

    def is_right(request: RankRequest, text: str) -> bool:
        by = chosen if options.answering != "generate" and request.options else written
        return by.is_correct(request, text)

    return is_right
