"""The report of a comparison: Markdown tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from rlaif_fast.comparison.plan import Plan, Table
from rlaif_fast.comparison.results import Cell, read_table, write_results
from rlaif_fast.comparison.runs import markdown_table
from rlaif_fast.outputs import save_figure, write_atomically
from rlaif_fast.report.stats import Interval

Cells = Mapping[tuple[str, str], Cell]


def write_report(plan: Plan) -> Path:
    """Write `comparison.md`, `comparison.json` and one figure per table, naming what has not finished. Returns the
    path of the first."""
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    tables = {table.name: read_table(plan, table) for table in plan.tables}
    parts = ["# Comparison\n"]
    for table in plan.tables:
        cells = tables[table.name]
        parts.append(f"## {table.name}\n\n{describe(table, cells)}\n")
        if cells:
            parts += [accuracy_table(table, cells), category_table(table, cells), cost_table(table, cells)]
            draw_curves(table, cells, plan.output_dir / f"{table.name}.png")
            shown = "Validation accuracy against sampled tokens and time; strong the mean over the seeds"
            parts.append(f"![{shown}]({table.name}.png)\n")
    parts += provenance(tables)
    write_results(plan.output_dir / "comparison.json", tables)
    file = plan.output_dir / "comparison.md"
    write_atomically(file, "\n".join(parts))
    return file


def describe(table: Table, cells: Cells) -> str:
    """How many runs and questions a table rests on, and how to read it."""
    wanted = len(table.seeds) * len(table.arms) * len(table.feedback)
    found = sum(len(cell.outcomes) for cell in cells.values())
    questions = sorted({len(o.correct) for cell in cells.values() for o in cell.outcomes.values()})
    sizes = " or ".join(map(str, questions)) or "no"
    left_out = missing_questions(cells)
    partly = (
        f" Questions without a scored answer: {', '.join(left_out)}. A lead counts those that both runs answered; "
        "`quarantine.jsonl` in a run's folder names the files that could not be read."
        if left_out
        else ""
    )
    return (
        f"{found} of {wanted} runs have finished, on {sizes} test questions each. Accuracy is the mean over the seeds. "
        f"The second figure is the lead over {table.baseline} in points with its 95% interval (paired: Student's t "
        f"over the seeds, or the bootstrap of seeds and videos where that reaches further); an interval above 0 is "
        f"bold.{one_seed(table, cells)}{partly}"
    )


def one_seed(table: Table, cells: Cells) -> str:
    """What an interval of one seed does not cover, with a leading space; "" if there is none."""
    alone = any(
        len(cell.outcomes.keys() & cells[feedback, table.baseline].outcomes.keys()) == 1
        for (feedback, _), cell in cells.items()
        if cell.ahead is not None
    )
    return " An interval of one seed knows nothing of the spread between seeds." if alone else ""


def provenance(tables: Mapping[str, Cells]) -> list[str]:
    """Machine, versions and commit that runs were made with, a line for each that occurs; nothing without a run."""
    runs = [o for cells in tables.values() for cell in cells.values() for o in cell.outcomes.values()]
    lines = [f"- {made}" for made in sorted({outcome.provenance for outcome in runs})]
    return ["The runs were made with:\n", *lines, ""] if lines else []


def missing_questions(cells: Cells) -> list[str]:
    """Name each run that lacks questions that another run of its seed has, with their number."""
    asked: dict[int, set[str]] = {}
    for cell in cells.values():
        for seed, outcome in cell.outcomes.items():
            asked.setdefault(seed, set()).update(outcome.correct, outcome.start)
    return [
        f"{lacking} of seed {seed}, {feedback}/{arm}"
        for (feedback, arm), cell in cells.items()
        for seed, outcome in cell.outcomes.items()
        if (lacking := len(asked[seed] - (outcome.correct.keys() & outcome.start.keys())))
    ]


def accuracy_table(table: Table, cells: Cells) -> str:
    """One row per arm, one column per kind of feedback."""
    rows = []
    for arm in table.arms:
        row = [arm]
        for feedback in table.feedback:
            cell = cells.get((feedback, arm))
            row.append("–" if cell is None else _cell(cell, len(table.seeds)))
        rows.append(row)
    starts: dict[int, list[float]] = {}
    for cell in cells.values():
        for seed, outcome in cell.outcomes.items():
            starts.setdefault(seed, []).append(outcome.start_accuracy)
    # Each seed counts once, however many of its arms have finished.
    start = _mean(map(_mean, starts.values()))
    rows.append(["start", *[f"{start:.1%}"] * len(table.feedback)])
    return markdown_table(["arm", *table.feedback], rows) + "\n"


def category_table(table: Table, cells: Cells) -> str:
    """Change of each category from the start, in points, by arm, under the first kind of feedback."""
    feedback = table.feedback[0]
    arms = [arm for arm in table.arms if (feedback, arm) in cells]
    if not arms:
        return ""
    categories = sorted(
        {c for arm in arms for o in cells[feedback, arm].outcomes.values() for c in o.category.values()}
    )
    rows = [
        [category, *(_category_change(cells[feedback, arm], category) for arm in arms)]
        for category in categories
    ]
    return markdown_table([f"category ({feedback})", *arms], rows) + "\n"


def _category_change(cell: Cell, category: str) -> str:
    changes = []
    for outcome in cell.outcomes.values():
        names = [
            name for name, value in outcome.category.items() if value == category and name in outcome.start
        ]
        if names:
            changes.append(_mean(outcome.correct[name] - outcome.start[name] for name in names))
    return f"{100 * _mean(changes):+.1f}" if changes else "–"


def cost_table(table: Table, cells: Cells) -> str:
    """What each arm cost, as the mean over seeds and kinds of feedback."""
    rows = []
    for arm in table.arms:
        outcomes = [o for (_, name), cell in cells.items() if name == arm for o in cell.outcomes.values()]
        if outcomes:
            rows.append(
                [
                    arm,
                    f"{_mean(o.sampled_tokens for o in outcomes):,.0f}",
                    f"{_mean(o.oracle_groups for o in outcomes):,.0f}",
                    f"{_mean(o.seconds for o in outcomes):.0f} s",
                    f"{max(o.peak_rss_bytes for o in outcomes) / 2**30:.2f} GiB",
                ]
            )
    head = ["arm", "sampled tokens", "groups ranked", "time", "most memory"]
    return markdown_table(head, rows) + "\n"


def _cell(cell: Cell, seeds: int) -> str:
    text = f"{cell.accuracy:.1%}"
    if len(cell.outcomes) < seeds:
        text += f", {len(cell.outcomes)} of {seeds} seeds"
    if cell.ahead is not None:
        lead = _points(cell.ahead)
        text += f" ({f'**{lead}**' if cell.ahead.low > 0 and not cell.ahead.is_point else lead})"
    return text


def _points(interval: Interval) -> str:
    if interval.is_point:
        return f"{100 * interval.mean:+.1f}, no interval"
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def draw_curves(table: Table, cells: Cells, file: Path) -> None:
    """Draw validation accuracy against sampled tokens and against time, one row per kind of feedback.

    A strong line is the mean over the seeds up to the shortest run, a faint line a single seed.
    """
    import matplotlib

    from rlaif_fast.report.style import drawing

    matplotlib.use("Agg")
    with drawing({}):
        _draw_curves(table, cells, file)


def _draw_curves(table: Table, cells: Cells, file: Path) -> None:
    from matplotlib import pyplot

    kinds = [f for f in table.feedback if any(key[0] == f for key in cells)]
    figure, axes = pyplot.subplots(len(kinds), 2, figsize=(11, 3.6 * len(kinds)), squeeze=False, sharey="row")
    palette = pyplot.get_cmap("tab10" if len(table.arms) <= 10 else "tab20")
    colors = {arm: palette(i % palette.N) for i, arm in enumerate(table.arms)}
    lines = {}
    for row, feedback in zip(axes, kinds):
        for arm in table.arms:
            cell = cells.get((feedback, arm))
            if cell is None:
                continue
            curves = [outcome.curve for outcome in cell.outcomes.values() if outcome.curve]
            if not curves:
                continue
            steps = min(map(len, curves))
            mean = np.array([curve[:steps] for curve in curves]).mean(0)  # (steps, 4)
            # Beyond the shortest seed there is no mean; the faint lines show the longer ones.
            singles = [np.array(curve) for curve in curves if len(curves) > 1]
            for points, style in (*((single, {"lw": 0.8, "alpha": 0.3}) for single in singles), (mean, {})):
                for axis, x in ((row[0], points[:, 1] / 1e3), (row[1], points[:, 2] - points[0, 2])):
                    [lines[arm]] = axis.plot(x, 100 * points[:, 3], color=colors[arm], **style)
        row[0].set_ylabel(f"{feedback}\nvalidation accuracy (%)")
        row[0].set_xlabel("sampled tokens (thousands)")
        row[1].set_xlabel("seconds of the RL stage")
        for axis in row:
            axis.grid(alpha=0.3)
    if lines:  # from all rows: an arm may not have finished in the first
        arms = [arm for arm in table.arms if arm in lines]
        axes[0][0].legend([lines[arm] for arm in arms], arms, fontsize=8, frameon=False)
    figure.tight_layout()
    save_figure(figure, file, dpi=130)
    pyplot.close(figure)
