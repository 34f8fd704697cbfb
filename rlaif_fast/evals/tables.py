"""Results of an evaluation: a table in the terminal, CSV, JSON, and bars before and after."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_fast.errors import UsageError, writing
from rlaif_fast.evals.records import Record
from rlaif_fast.outputs import write_atomically
from rlaif_fast.report.stats import Interval, left_out, most_asked, paired_bootstrap, share_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        group: The group that it is a value of, such as "duration"; "all" for the whole.
        value: The value.
        n: Questions.
        unanswered: Those that could not be asked; they count as wrong.
        accuracy: Share of right answers and its 95% interval; answers about one video are not independent.
        judged: Answers that a judge graded.
        judge_accuracy: Share of those it said yes to; None if it graded none. A question for the judge that could
            not be asked counts as a no.
        judge_score: Their mean grade, 0 to 5; a question that could not be asked counts as 0.
        before: Accuracy of another evaluation on the same questions; None if there is none to compare with.
        change: The difference from it and its paired interval.
    """

    group: str
    value: str
    n: int
    unanswered: int
    accuracy: Interval
    judged: int = 0
    judge_accuracy: float | None = None
    judge_score: float | None = None
    before: float | None = None
    change: Interval | None = None


def table_of(
    records: Sequence[Record], before: Sequence[Record] | None = None, for_judge: Collection[str] = ()
) -> list[Line]:
    """The lines of the table: the whole, then each value of each group.

    Args:
        records: All records of an evaluation.
        before: All records of another one on the same questions.
        for_judge: Ids of the questions whose answers a judge was meant to grade.

    Raises:
        UsageError: The two evaluations are on different questions.
    """
    known: Mapping[str, Record] | None = None
    if before is not None:
        refuse_other_questions(before, {record.id: (record.question, record.answer) for record in records})
        known = {record.id: record for record in before}
    parts: dict[tuple[str, str], list[Record]] = {("all", "all"): list(records)}
    for group in dict.fromkeys(name for record in records for name in record.groups):
        found: dict[str, list[Record]] = {}
        for record in records:
            if group in record.groups:
                found.setdefault(record.groups[group], []).append(record)
        parts |= {(group, value): found[value] for value in sorted(found)}
    return [_line(group, value, part, known, for_judge) for (group, value), part in parts.items()]


def refuse_other_questions(before: Sequence[Record], asked: Mapping[str, tuple[str, str | None]]) -> None:
    """Check that two evaluations can be compared.

    Args:
        before: All records of one.
        asked: (question, reference answer) by id of the other.

    Raises:
        UsageError: The two evaluations are on different questions.
    """
    known = {record.id: record for record in before}
    if known.keys() != asked.keys():
        raise UsageError(
            f"before: it holds {len(known)} questions, {len(asked.keys() & known.keys())} of them among the "
            f"{len(asked)} of this evaluation; compare evaluations of the same questions"
        )
    for name, (question, answer) in asked.items():
        other = known[name]
        if (other.question, other.answer) != (question, answer):
            raise UsageError(
                f"before: its {name!r} asked {other.question!r:.60} (right: {other.answer!r:.40}), this "
                f"evaluation {question!r:.60} (right: {answer!r:.40}); compare evaluations of the same questions"
            )


def _line(
    group: str,
    value: str,
    part: Sequence[Record],
    before: Mapping[str, Record] | None,
    for_judge: Collection[str],
) -> Line:
    right, videos = [float(record.correct) for record in part], [record.video for record in part]
    graded = [record for record in part if record.pred is not None]
    counted = len(graded) + sum(record.prediction is None and record.id in for_judge for record in part)
    earlier = None if before is None else [float(before[record.id].correct) for record in part]
    return Line(
        group=group,
        value=value,
        n=len(part),
        unanswered=sum(record.prediction is None for record in part),
        accuracy=share_interval(right, videos),
        judged=len(graded),
        judge_accuracy=sum(bool(r.pred) for r in graded) / counted if graded else None,
        judge_score=sum(r.score or 0 for r in graded) / counted if graded else None,
        before=None if earlier is None else sum(earlier) / len(earlier),
        change=None if earlier is None else paired_bootstrap(earlier, right, clusters=videos),
    )


def as_text(lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    judged, compared = any(line.judged for line in lines), lines[0].change is not None
    missed = any(line.unanswered for line in lines)
    head = ["", "n", *(["unanswered"] if missed else []), "accuracy", "95% interval"]
    head += ["judge", "0-5"] if judged else []
    head += ["before", "change", "95% interval"] if compared else []
    rows, group = [head], ""
    for line in lines:
        if line.group != group and line.group != "all":
            rows.append([line.group] + [""] * (len(head) - 1))
        group = line.group
        cells = [
            line.value if group == "all" else f"  {line.value}",
            str(line.n),
            *([str(line.unanswered)] if missed else []),
            f"{line.accuracy.mean:.1%}",
        ]
        cells.append(f"{line.accuracy.low:.1%} to {line.accuracy.high:.1%}")
        if judged:
            graded = line.judge_accuracy is not None and line.judge_score is not None
            cells += [f"{line.judge_accuracy:.1%}", f"{line.judge_score:.2f}"] if graded else ["", ""]
        if compared and line.change is not None:
            low, high = 100 * line.change.low, 100 * line.change.high
            ends = "none" if line.change.is_point else f"{low:+.1f} to {high:+.1f}"
            cells += [f"{line.before:.1%}", f"{100 * line.change.mean:+.1f}", ends]
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    texts = []
    for row in rows:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        texts.append("  ".join([first, *others]).rstrip())
    return "\n".join(texts)


def write_tables(folder: Path, lines: Sequence[Line], records: Sequence[Record], title: str) -> None:
    """Write `table.csv`, `summary.json` and `accuracy.png`."""
    rows = [_flat(line) for line in lines]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "table.csv", text.getvalue())
    troubles = {record.id: record.trouble for record in records if record.trouble}
    write_atomically(
        folder / "summary.json", json.dumps({"table": rows, "unanswered": troubles}, indent=1) + "\n"
    )
    with writing(folder / "accuracy.png"):
        from rlaif_fast.report.figures import WIDE, to_png

        title, drawn = title + left_out(lines, "rows"), most_asked(lines)
        to_png(
            folder / "accuracy.png",
            [(title, lambda axes: draw_bars(axes, drawn))],
            (WIDE, 70 + 26 * len(drawn)),
        )


def _flat(line: Line) -> dict[str, str | int | float | None]:
    change = line.change
    return {
        "group": line.group,
        "value": line.value,
        "n": line.n,
        "unanswered": line.unanswered,
        "accuracy": line.accuracy.mean,
        "low": line.accuracy.low,
        "high": line.accuracy.high,
        "judged": line.judged,
        "judge_accuracy": line.judge_accuracy,
        "judge_score": line.judge_score,
        "before": line.before,
        "change": None if change is None else change.mean,
        "change_low": None if change is None else change.low,
        "change_high": None if change is None else change.high,
    }


def draw_bars(axes: Axes, lines: Sequence[Line]) -> None:
    """Accuracy of each line with its interval, beside that of another evaluation if there is one."""
    from rlaif_fast.report.figures import AFTER, BEFORE, INK

    compared = lines[0].before is not None
    for place, line in enumerate(lines):
        y = len(lines) - 1 - place
        height = 0.36 if compared else 0.64
        shift = -0.19 if compared else 0.0
        axes.barh(y + shift, line.accuracy.mean, height, color=AFTER)
        axes.plot([line.accuracy.low, line.accuracy.high], [y + shift] * 2, color=INK, lw=1.2)
        axes.text(1.02, y, f"{line.accuracy.mean:.1%}", va="center", color=INK, fontsize=10)
        if line.before is not None:
            axes.barh(y + 0.19, line.before, height, color=BEFORE)
    names = [line.value if line.group == "all" else f"{line.group}: {line.value}" for line in lines]
    axes.set_yticks(range(len(lines) - 1, -1, -1), [f"{n}  ({line.n})" for n, line in zip(names, lines)])
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if compared:
        handles = [axes.barh([0], [0], color=color) for color in (BEFORE, AFTER)]
        # Above the bars, since any of them may reach the right edge.
        corner = (1.0, 1.0)
        axes.legend(
            handles, ["before", "after"], loc="lower right", bbox_to_anchor=corner, ncols=2, frameon=False
        )
