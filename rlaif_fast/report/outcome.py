"""What a run prints and writes: notes, predictions, samples for the gallery, the report, the summary."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rlaif_fast.algorithms.group import rank_rollout
from rlaif_fast.data import chance_by_category
from rlaif_fast.data.schema import named_categories
from rlaif_fast.errors import writing
from rlaif_fast.machine import cores, peak_rss_bytes
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.oracle.wrappers import oracles_in
from rlaif_fast.prompts.batches import by_media
from rlaif_fast.report.before_after import Pair, by_category, scored_pairs
from rlaif_fast.report.html import write_report
from rlaif_fast.runs.files import json_line, read_jsonl, write_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.logging import RunLogger, SilentLogger
from rlaif_fast.trainer.drawing import sampling_params
from rlaif_fast.trainer.evaluation import EvalResult
from rlaif_fast.trainer.rollout_log import rollout_records
from rlaif_fast.trainer.run import Run


def describe(run: Run) -> None:
    """Print in a few lines what is about to run."""
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    trained = sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad)
    data, config = run.data, run.config
    run.logger.message(
        f"policy: {config.model}, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; "
        f"oracle: {run.oracle.name}"
    )
    run.logger.message(
        f"rows: {len(data.sft)} sft, {len(data.rl)} rl, {len(data.validation)} validation, {len(data.test)} test"
    )


def notes_on_data(run: Run) -> list[str]:
    """What a reader of the report must know about the data."""
    taught = run.data.sft if run.config.sft != "none" else []
    corrupted = sum(bool(row.metadata.get("corrupted")) for row in taught)
    notes = []
    if run.config.data == "synthetic":
        notes.append(
            "The clips are generated: shapes that move over textured backgrounds; the policy is tiny."
        )
    if corrupted:
        undone = (
            "; the oracle ranks against the right answers, so most of what RL gains here is the undoing of that noise, "
            "not new perception"
        )
        by_answers = any(isinstance(oracle, ReferenceOracle) for oracle in oracles_in(run.oracle))
        notes.append(
            f"{corrupted} of {len(taught)} supervised answers have one fact wrong on purpose, as a weak annotator's "
            f"would{undone if by_answers and not run.config.oracle_shuffle else ''}."
        )
    if run.data.metric == "oracle":
        notes.append(
            f"Validation and test answers were ranked by the oracle {run.oracle.name} against those where RL began."
        )
    if run.config.oracle_shuffle:
        notes.append("Control: the oracle's rankings were shuffled.")
    return notes


def write_predictions(run_dir: RunDir, phase: str, result: EvalResult, run: Run) -> None:
    """predictions-PHASE.jsonl: every test row with its greedy answer and the accuracy of blind guessing."""
    if not run.world.is_main:
        return
    chance = chance_by_category(run.data.test, reference=run.data.rl)
    write_jsonl(
        run_dir.predictions(phase),
        (
            {
                "example_id": prediction.example.id,
                "category": prediction.example.category,
                "video": next(iter((*prediction.example.videos, *prediction.example.images)), None),
                "prediction": prediction.text,
                "answer": prediction.example.answer,
                "correct": None if prediction.correct is None else bool(prediction.correct),
                **({} if prediction.win is None else {"win": prediction.win}),
                "chance": chance.get(prediction.example.category),
            }
            for prediction in result.predictions
        ),
    )


def write_samples(run_dir: RunDir, phase: str, run: Run) -> None:
    """samples.jsonl: what the policy samples for a few test clips, with the oracle's ranks, for the gallery."""
    with run.policy.gathered():  # all processes take part
        if run.world.is_main:
            _write_samples(run_dir, phase, run)


def _write_samples(run_dir: RunDir, phase: str, run: Run) -> None:
    config = run.config
    clips = by_media(run.data.test)[: config.gallery_clips]
    rows = [clip[i % len(clip)] for i, clip in enumerate(clips)]
    if not rows:
        return
    with run.logger.timer("gallery"), torch.no_grad():
        prompts = run.make_batch(rows)
        if not prompts:  # no clip can be read
            return
        params = sampling_params(config, config.seed)
        rollout = run.sampler.sample(prompts, config.num_generations, params)
        groups = rank_rollout(prompts, rollout, run.oracle, run.algorithm)
        greedy = run.sampler.sample(prompts, 1, dataclasses.replace(params, temperature=0.0)).texts
    with writing(run_dir.samples), run_dir.samples.open("a", encoding="utf-8") as lines:
        for record, text in zip(rollout_records(groups, 0), greedy):
            lines.write(json_line({"phase": phase, **record, "greedy": text}))


def finish(run: Run, run_dir: RunDir, notes: Sequence[str], others_rss_bytes: int) -> None:
    """Write the report, then the summary: its presence means that the run finished.

    Args:
        run: The run.
        run_dir: Its folder.
        notes: What a reader must know.
        others_rss_bytes: Peak memory of the run's other processes.
    """
    config, logger = run.config, run.logger

    def used() -> dict:
        return {
            "seconds": logger.elapsed(),
            "seconds_by_stage": logger.seconds(),
            "peak_rss_bytes": max(run.peak_before, peak_rss_bytes() + others_rss_bytes),
        }

    summary = {
        **accuracy_summary(run_dir),
        **used(),
        "processes": run.world.size,
        "seed": config.seed,
        "metric_for_best_model": run.data.metric,
        "config": dataclasses.asdict(config),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "notes": [*notes, *notes_on_data(run), *notes_on_answers(run_dir, len(run.data.test))],
    }
    if config.report:
        with logger.timer("report"):
            path = write_report(run_dir, summary=summary)
        logger.message(f"report: {path}")
    summary |= used()  # now including the report
    run_dir.write_summary(summary)
    print_result(summary, logger)


def accuracy_summary(run_dir: RunDir) -> dict:
    """Accuracy on the test split before and after RL, in total and by category, from the predictions on disk.

    As in the report, only questions that were answered both times and can be scored count; if there are none, the
    accuracy is None. `win_rate` is included if the final answers were ranked against those before RL.
    """
    pairs = scored_pairs(run_dir)
    wins = [row["win"] for row in read_jsonl(run_dir.predictions("final")) if "win" in row]
    before, after = _shares(pairs) if pairs else (None, None)
    return {
        "sft_accuracy": before,
        "final_accuracy": after,
        "by_category": {
            name: {**dict(zip(("sft", "final"), _shares(found))), "n": len(found)}
            for name, found in sorted(by_category(pairs).items())
        },
        **({"win_rate": sum(wins) / len(wins)} if wins else {}),
    }


def _shares(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Share of right answers before and after."""
    before, after = (sum(row["correct"] for row in rows) / len(pairs) for rows in zip(*pairs))
    return before, after


def notes_on_answers(run_dir: RunDir, asked: int) -> list[str]:
    """What a reader must know about the answers to the `asked` test questions."""
    before, after = (
        {row["example_id"] for row in read_jsonl(run_dir.predictions(phase))} for phase in ("sft", "final")
    )
    missing = asked - len(before & after)
    if missing == 0:
        return []
    return [
        f"Left out: {missing} of {asked} test questions, whose files could not be read before RL or after it."
    ]


def print_result(summary: dict, logger: RunLogger | SilentLogger) -> None:
    """Print the results of the run, by category."""
    if "win_rate" in summary:
        logger.message(
            f"test answers that the oracle ranks above those before RL, ties half: {summary['win_rate']:.3f}"
        )
    if summary["final_accuracy"] is not None:
        print_accuracies(summary, logger)
    logger.message(f"{summary['seconds']:.0f} s, peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB")


def print_accuracies(summary: dict, logger: RunLogger | SilentLogger) -> None:
    """Print test accuracy before and after RL, by category."""
    by_category = summary["by_category"]
    width = max(map(len, ["held-out accuracy", *by_category]))
    logger.message(f"{'held-out accuracy':<{width}}  {'before RL':>9}  {'after RL':>8}  {'n':>5}")
    for name, row in named_categories(by_category).items():
        logger.message(f"{name:<{width}}  {row['sft']:9.3f}  {row['final']:8.3f}  {row['n']:5d}")
    total = sum(row["n"] for row in by_category.values())
    logger.message(
        f"{'all':<{width}}  {summary['sft_accuracy']:9.3f}  {summary['final_accuracy']:8.3f}  {total:5d}"
    )


def git_commit() -> str | None:
    """Commit of the source tree, with "+" if it has changes; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            [git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [git, "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of the packages that the results depend on."""
    found = {"python": platform.python_version()}
    for name in ("rlaif-fast", "torch", "transformers", "triton", "av", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """CPU count and GPU, in words."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {cores()} cores, {gpu}"
