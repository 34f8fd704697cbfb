"""Results of several finished runs, as Markdown tables.

Runs that differ only in their seed share one row, named by the settings in which the rows differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError
from rlaif_fast.runs.folder import RunDir

# Settings that say where a run is written and what it shows, not what it does.
NOT_COMPARED = frozenset(
    {
        "cache_dir",
        "debug",
        "eval_videos_per_step",
        "frame_cache_bytes",
        "gallery_clips",
        "logging_steps",
        "output_dir",
        "overwrite_output_dir",
        "report",
        "resume",
        "seed",
        "tensorboard",
        "report_to",
        "threads",
    }
)


@dataclass(frozen=True)
class Result:
    """The summary of one finished run, as far as it is compared.

    Attributes:
        name: Folder of the run.
        seed: Its seed.
        settings: Its configuration as text, without the settings that are not compared.
        before: Test accuracy at the start of RL, in [0, 1].
        after: Test accuracy at the end.
        by_category: Test accuracy before and after, by category.
        questions: Test questions.
        seconds: Wall-clock time.
        peak_rss_bytes: Peak memory.
        provenance: Machine, versions and commit, in words.
        test: What `tested_on` gives.
    """

    name: str
    seed: int
    settings: Mapping[str, str]
    before: float
    after: float
    by_category: Mapping[str, tuple[float, float]]
    questions: int
    seconds: float
    peak_rss_bytes: float
    provenance: str
    test: Mapping[str, str]

    @property
    def gain(self) -> float:
        """What RL added to the accuracy."""
        return self.after - self.before


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, by seed."""

    label: str
    runs: tuple[Result, ...]

    def mean(self, value: Callable[[Result], float]) -> float:
        """The mean of a value over the runs."""
        return statistics.fmean(value(run) for run in self.runs)

    def category_changes(self) -> dict[str, float]:
        """Mean change of each category over the runs that have it."""
        changes: dict[str, list[float]] = {}
        for run in self.runs:
            for name, (before, after) in run.by_category.items():
                changes.setdefault(name, []).append(after - before)
        return {name: statistics.fmean(values) for name, values in sorted(changes.items())}


def read_result(path: str | Path) -> Result:
    """Read the summary of a run.

    Raises:
        UsageError: It is not a finished run, none of its test answers was scored, or its summary lacks something.
    """
    run = RunDir.open(path)
    summary = run.read_summary()
    accuracies = [summary.get(name, 0) for name in ("sft_accuracy", "final_accuracy")]
    if None in accuracies or summary.get("by_category") == {}:
        raise UsageError(f"{path}: no test answer was scored, so there is no accuracy to compare")
    try:
        return Result(
            name=run.path.resolve().name,
            seed=summary["seed"],
            settings={key: str(value) for key, value in summary["config"].items() if key not in NOT_COMPARED},
            before=summary["sft_accuracy"],
            after=summary["final_accuracy"],
            by_category={name: (row["sft"], row["final"]) for name, row in summary["by_category"].items()},
            questions=sum(row["n"] for row in summary["by_category"].values()),
            seconds=summary["seconds"],
            peak_rss_bytes=summary["peak_rss_bytes"],
            provenance=made_with(summary),
            test=tested_on(run),
        )
    except KeyError as error:
        raise UsageError(f"{run.summary} has no {error}; make the run again with this version") from error


def made_with(summary: Mapping[str, Any]) -> str:
    """Machine, versions and commit of a run, in words."""
    known = (
        str(summary.get("machine") or ""),
        ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items()),
        f"commit {str(summary.get('git_commit') or 'unknown')[:10]}",
    )
    return "; ".join(part for part in known if part)


def tested_on(run: RunDir) -> dict[str, str]:
    """Digests of a run's test rows ("data"), their metadata and their media; unknown ones are missing."""
    known = {kind: run.began_with(kind, {}, keep=False) for kind in ("data", "metadata", "media")}
    return {kind: digests["test"] for kind, digests in known.items() if "test" in digests}


def group_results(results: Sequence[Result]) -> list[Group]:
    """Put runs of equal settings together, in the order in which the settings first appear.

    Raises:
        UsageError: Two runs differ only in where they were written.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        same = groups.setdefault(tuple(sorted(result.settings.items())), [])
        twin = next((other for other in same if other.seed == result.seed), None)
        if twin is not None:
            raise UsageError(
                f"{twin.name} and {result.name} have the same settings and seed {result.seed}; leave one out"
            )
        same.append(result)
    settings = [dict(key) for key in groups]
    names = sorted({name for each in settings for name in each})
    differing = [name for name in names if len({each.get(name) for each in settings}) > 1]
    return [
        Group(
            label=", ".join(f"{name}={each.get(name, 'unset')}" for name in differing) or runs[0].name,
            runs=tuple(sorted(runs, key=lambda run: run.seed)),
        )
        for each, runs in zip(settings, groups.values())
    ]


def results_table(groups: Sequence[Group]) -> str:
    """One row per group: accuracies, gains in points, every seed's gain, and the category that gained least."""
    rows = []
    for group in groups:
        name, change = min(group.category_changes().items(), key=lambda item: item[1])
        rows.append(
            [
                group.label,
                " ".join(str(run.seed) for run in group.runs),
                f"{group.mean(lambda run: run.before):.1%}",
                f"{group.mean(lambda run: run.after):.1%}",
                f"{100 * group.mean(lambda run: run.gain):+.1f}",
                " ".join(f"{100 * run.gain:+.1f}" for run in group.runs),
                f"{name} {100 * change:+.1f}",
                f"{group.mean(lambda run: run.seconds):.0f} s",
                f"{max(run.peak_rss_bytes for run in group.runs) / 2**30:.2f} GiB",
            ]
        )
    head = [
        "run",
        "seeds",
        "before RL",
        "after RL",
        "gain",
        "gain by seed",
        "least gain",
        "mean time",
        "most memory",
    ]
    return markdown_table(head, rows)


def category_table(groups: Sequence[Group]) -> str:
    """One row per category: mean accuracy before and after RL in each group."""
    categories = sorted({name for group in groups for run in group.runs for name in run.by_category})
    rows = []
    for category in categories:
        cells = [category]
        for group in groups:
            pairs = [run.by_category[category] for run in group.runs if category in run.by_category]
            if pairs:
                before, after = (statistics.fmean(side) for side in zip(*pairs))
                cells.append(f"{before:.1%} → {after:.1%}")
            else:
                cells.append("–")
        rows.append(cells)
    return markdown_table(["category", *(group.label for group in groups)], rows)


def provenance(groups: Sequence[Group]) -> str:
    """Where the figures come from: test size, machine, versions and commit, one line for each that occurs.

    Runs of a seed that were tested on different data are named.
    """
    runs = [run for group in groups for run in group.runs]
    sizes = " or ".join(str(size) for size in sorted({run.questions for run in runs}))
    lines = [f"{sizes} held-out questions a run; gains are in points; the means are over the seeds."]
    lines += [f"- {text}" for text in sorted({run.provenance for run in runs})]
    return "\n".join([*lines, *_other_tests(runs)])


def _other_tests(runs: Sequence[Result]) -> Iterator[str]:
    """A line for each seed whose runs were tested on different data, with the runs of each."""
    for seed in sorted({run.seed for run in runs}):
        for kind in ("data", "metadata", "media"):
            names: dict[str, list[str]] = {}
            for run in runs:
                if run.seed == seed and kind in run.test:
                    names.setdefault(run.test[kind], []).append(run.name)
            if len(names) > 1:
                what = "rows" if kind == "data" else kind
                apart = " and ".join(", ".join(same) for same in names.values())
                yield f"- Tested on different {what} (seed {seed}): {apart}. Their accuracies do not compare."
                break


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([line(head), rule, *(line(row) for row in rows)])
