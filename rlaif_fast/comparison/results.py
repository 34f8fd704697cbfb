"""What the runs of a comparison reached: accuracies by arm, and differences from the baseline with intervals.

An interval is Student's t over the seeds, or the bootstrap of seeds and whole videos if that is wider. Both
arms of a difference share the seeds, the starts and the questions, so it is paired.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_fast.comparison.plan import Plan, Table
from rlaif_fast.comparison.runs import made_with, tested_on
from rlaif_fast.errors import UsageError
from rlaif_fast.outputs import write_atomically
from rlaif_fast.report.stats import RESAMPLES, Interval, percentile_interval
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    A question is missing if its file could not be read (the run's `quarantine.jsonl` says why) or its answer not
    scored.

    Attributes:
        correct: Whether each test question was answered right, by question.
        video: The video of each question; the question itself if it has none.
        category: The category of each question.
        start: As `correct`, but at the start of RL.
        curve: (step, sampled tokens, seconds, validation accuracy) of each evaluation of the RL stage; the accuracy
            is NaN if no validation answer was scored.
        sampled_tokens: Tokens sampled by the policy. Here and below, a line of the metrics counts for all steps
            since the previous line (`logging_steps`).
        oracle_groups: Groups that the oracle was asked to rank.
        seconds: Wall-clock time.
        peak_rss_bytes: Peak memory.
        provenance: Machine, versions and commit, in words.
        test: What `tested_on` gives.
    """

    correct: Mapping[str, bool]
    video: Mapping[str, str]
    category: Mapping[str, str]
    start: Mapping[str, bool]
    curve: tuple[tuple[int, float, float, float], ...]
    sampled_tokens: float
    oracle_groups: float
    seconds: float
    peak_rss_bytes: float
    provenance: str
    test: Mapping[str, str]

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end."""
        return float(np.mean(list(self.correct.values())))

    @property
    def start_accuracy(self) -> float:
        """Test accuracy at the start of RL."""
        return float(np.mean(list(self.start.values())))


def read_outcome(folder: Path) -> Outcome | None:
    """Read a finished run; None if it has not finished.

    Raises:
        UsageError: Its records are damaged, or none of its test answers was scored, before RL or after.
    """
    run = RunDir(folder)
    if not run.finished:
        return None
    summary = run.read_summary()
    run.refuse_damaged_results(summary)
    start, final = (
        [row for row in read_jsonl(run.predictions(phase)) if row["correct"] is not None]
        for phase in ("sft", "final")
    )
    if not (start and final):
        raise UsageError(f"{folder}: no test answer was scored, so there is no accuracy to compare")
    curve, tokens, groups, step = [], 0.0, 0.0, 0
    generations = summary["config"]["num_generations"]
    for record in read_jsonl(run.metrics):
        if record["stage"] == "rl":
            steps, step = record["step"] - step, record["step"]
            sampled = record.get("groups", 0)  # none if no file of the step could be read
            tokens += steps * (record.get("completion_length") or 0.0) * sampled * generations
            groups += steps * record.get("oracle/groups", sampled)
        elif record["stage"] == "eval" and record["phase"] == "rl":
            accuracy = math.nan if record["accuracy"] is None else record["accuracy"]
            curve.append((record["step"], tokens, record["time"], accuracy))
    return Outcome(
        correct={row["example_id"]: row["correct"] for row in final},
        video={row["example_id"]: str(row["video"] or row["example_id"]) for row in final},
        category={row["example_id"]: row["category"] for row in final},
        start={row["example_id"]: row["correct"] for row in start},
        curve=tuple(curve),
        sampled_tokens=tokens,
        oracle_groups=groups,
        seconds=summary["seconds"],
        peak_rss_bytes=summary["peak_rss_bytes"],
        provenance=made_with(summary),
        test=tested_on(run),
    )


# Quantile of Student's t for a two-sided interval of 95%, by degrees of freedom from 1 to 30.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def over_seeds(differences: Sequence[np.ndarray]) -> Interval:
    """Return the mean over seeds and its 95% interval.

    If seeds differ by more than their questions explain, percentiles of a bootstrap over three seeds cover the truth
    75% of the time, over five seeds 83%. Student's t covers it 95% of the time, but knows nothing of the questions.
    The interval covers both. For one seed it is the bootstrap's.

    Args:
        differences: For each seed (clusters, 2): the sum of the differences in a cluster, and its number of questions.
    """
    drawn = two_level_bootstrap(differences)
    if len(differences) == 1:
        return drawn
    means = [part[:, 0].sum() / part[:, 1].sum() for part in differences]
    half = _T[min(len(means) - 1, len(_T)) - 1] * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return Interval(drawn.mean, min(drawn.low, drawn.mean - half), max(drawn.high, drawn.mean + half))


def two_level_bootstrap(differences: Sequence[np.ndarray]) -> Interval:
    """Return the mean over seeds and its 95% bootstrap interval: seeds are drawn, then whole videos within each.

    Args:
        differences: For each seed (clusters, 2): the sum of the differences in a cluster, and its number of questions.
    """
    if not differences:
        raise ValueError("differences: expected at least one seed, got none")
    generator = np.random.default_rng(0)
    mean = float(np.mean([part[:, 0].sum() / part[:, 1].sum() for part in differences]))
    chosen = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    totals = np.zeros(RESAMPLES)
    for k, part in enumerate(differences):
        places = np.nonzero(chosen == k)[0]  # one entry for each time that this seed was drawn
        # Few clusters differ, so they are drawn by kind: the count of each kind is multinomial.
        kinds, counts = np.unique(part, axis=0, return_counts=True)
        for some in np.array_split(places, max(1, len(places) * len(kinds) // 2**20)):
            drawn = generator.multinomial(len(part), counts / len(part), size=len(some)) @ kinds
            np.add.at(totals, some, drawn[:, 0] / drawn[:, 1])
    return percentile_interval(mean, totals / len(differences))


def difference(arm: Sequence[Outcome], baseline: Sequence[Outcome]) -> Interval:
    """Return by how much an arm is ahead of the baseline, in accuracy; both hold the same seeds in the same order."""
    return over_seeds([_by_video(one.correct, other.correct, one.video) for one, other in zip(arm, baseline)])


def gain(arm: Sequence[Outcome]) -> Interval:
    """Return what an arm added to its start, in accuracy."""
    return over_seeds([_by_video(one.correct, one.start, one.video) for one in arm])


def _by_video(
    after: Mapping[str, bool], before: Mapping[str, bool], video: Mapping[str, str]
) -> np.ndarray:  # (videos, 2)
    """Sum of the changes and number of questions of each video, over the questions that both hold."""
    both = [name for name in after if name in before]
    if not both:
        raise UsageError(
            "two runs of a seed share no test question; make the comparison again with one test set"
        )
    sums: dict[str, list[float]] = {}
    for name in both:
        entry = sums.setdefault(video[name], [0.0, 0.0])
        entry[0] += float(after[name]) - float(before[name])
        entry[1] += 1.0
    return np.array(list(sums.values()))


@dataclass(frozen=True)
class Cell:
    """One arm under one kind of feedback.

    Attributes:
        outcomes: By seed; seeds whose run has not finished are missing.
        gain: What it added to its start.
        ahead: By how much it is ahead of the baseline, over the seeds that both finished; None for the baseline, or
            if no seed has both.
    """

    outcomes: Mapping[int, Outcome]
    gain: Interval
    ahead: Interval | None

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over the seeds."""
        return float(np.mean([outcome.accuracy for outcome in self.outcomes.values()]))


def read_table(plan: Plan, table: Table) -> dict[tuple[str, str], Cell]:
    """Read what a table compares, by feedback and arm; an arm that has finished on no seed is missing.

    Raises:
        UsageError: A run's records are damaged, or two runs of a seed were tested on different data.
    """
    outcomes = {
        (feedback, arm): {
            seed: outcome
            for seed in table.seeds
            if (outcome := read_outcome(plan.arm_folder(seed, feedback, arm))) is not None
        }
        for feedback in table.feedback
        for arm in table.arms
    }
    for seed in table.seeds:
        _refuse_other_test(
            {
                plan.arm_folder(seed, feedback, arm): found[seed]
                for (feedback, arm), found in outcomes.items()
                if seed in found
            }
        )
    cells = {}
    for (feedback, arm), found in outcomes.items():
        if not found:
            continue
        base = outcomes[feedback, table.baseline]
        both = [seed for seed in found if seed in base]
        ahead = None
        if arm != table.baseline and both:
            ahead = difference([found[seed] for seed in both], [base[seed] for seed in both])
        cells[feedback, arm] = Cell(found, gain(list(found.values())), ahead)
    return cells


def _refuse_other_test(runs: Mapping[Path, Outcome]) -> None:
    """Check that runs of a seed, by folder, were tested on the same data: their answers are compared one by one."""
    known: dict[str, tuple[str, Path]] = {}
    for folder, outcome in runs.items():
        for kind, digest in outcome.test.items():
            before, where = known.setdefault(kind, (digest, folder))
            if digest != before:
                what = "rows" if kind == "data" else kind
                raise UsageError(
                    f"{folder} was tested on other {what} than {where}, so the two cannot be compared; bring the data "
                    "back and remove the folder that has the others, or choose another output_dir"
                )


def write_results(file: Path, tables: Mapping[str, Mapping[tuple[str, str], Cell]]) -> None:
    """Write every figure of the tables as JSON."""

    def cell(value: Cell) -> dict[str, Any]:
        return {
            "seeds": sorted(value.outcomes),
            "accuracy": {str(seed): outcome.accuracy for seed, outcome in value.outcomes.items()},
            "start_accuracy": {str(seed): outcome.start_accuracy for seed, outcome in value.outcomes.items()},
            "gain": vars(value.gain),
            "ahead_of_baseline": None if value.ahead is None else vars(value.ahead),
            "sampled_tokens": {str(seed): outcome.sampled_tokens for seed, outcome in value.outcomes.items()},
            "oracle_groups": {str(seed): outcome.oracle_groups for seed, outcome in value.outcomes.items()},
            "seconds": {str(seed): outcome.seconds for seed, outcome in value.outcomes.items()},
            "made_with": {str(seed): outcome.provenance for seed, outcome in value.outcomes.items()},
        }

    values = {
        name: {f"{feedback}/{arm}": cell(entry) for (feedback, arm), entry in cells.items()}
        for name, cells in tables.items()
    }
    write_atomically(file, json.dumps(values, indent=1) + "\n")
