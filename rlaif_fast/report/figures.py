"""The figures of a run report, drawn once for two uses: PNG files, and SVG that follows the page's theme.

Every colour in a figure is one of `COLORS`; in the SVG each becomes the CSS variable of that name, so that the
page decides how it looks on a light or a dark background.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlaif_fast.outputs import save_figure
from rlaif_fast.report.stats import Interval
from rlaif_fast.report.style import AFTER, BEFORE, COLORS, INK, MUTED, STYLE, THIRD, drawing

PNG_DPI = 160
WIDE, HALF, NARROW = 900, 640, 340  # figure widths in pixels


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: Its name in the legend.
        steps: (n,) steps.
        values: (n,) values; gaps are left out.
        low: (n,) lower end of the interval of each point, if any.
        high: (n,) upper end.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One learning curve.

    Attributes:
        title: What is shown.
        note: How to read it, in one line.
        curves: Up to three lines.
        xlabel: What a step is.
        points: Whether the values are few and exact, so that each is marked; else they are smoothed.
        percent: Whether the values are shares.
        marked_step: A step to point out, that of the kept checkpoint.
        wide: Whether it takes the space of two panels.
    """

    title: str
    note: str
    curves: tuple[Curve, ...]
    xlabel: str
    points: bool = False
    percent: bool = False
    marked_step: int | None = None
    wide: bool = False


@dataclass(frozen=True)
class Score:
    """Accuracy before and after RL on the same questions.

    Attributes:
        name: The category.
        n: Questions.
        before: Accuracy before RL, as shares.
        after: Accuracy after RL.
        change: The difference.
        chance: What guessing would give.
    """

    name: str
    n: int
    before: Interval
    after: Interval
    change: Interval
    chance: float


Draw = Callable[[Axes], None]


def to_svg(draw: Draw, width: int, height: int, label: str) -> str:
    """Draw one figure as an SVG element that scales with the page and takes its colours from it."""
    salt = f"{label} {width}"  # ids inside must differ from those of every other figure on the page
    with drawing({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    opening = re.match(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', text)
    assert opening is not None
    tag = f'<svg viewBox="{opening[1]}" role="img" aria-label="{html.escape(label)}">'
    text = tag + text[opening.end() :]
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text.strip()


def to_png(path: Path, draws: Sequence[tuple[str, Draw]], size: tuple[int, int], columns: int = 1) -> None:
    """Save titled figures side by side as one PNG.

    Args:
        path: File to write.
        draws: (title, figure) pairs.
        size: Width and height of one figure, in pixels at 72 dpi.
        columns: Figures per row.
    """
    rows = -(-len(draws) // columns)
    with drawing(STYLE):
        figure = Figure(
            figsize=(size[0] * columns / 72, size[1] * rows / 72), layout="constrained", facecolor="white"
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, draw) in zip(grid, draws):
            draw(axes)
            axes.set_title(title, pad=10)
        for axes in grid[len(draws) :]:
            axes.set_axis_off()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, dpi=PNG_DPI)


def to_overview(path: Path, total: Score, scores: Sequence[Score], panel: Panel | None, note: str) -> None:
    """Save the result of a run as one picture: the headline, the validation curve, the categories with a note."""
    left = [["headline"], ["panel"], ["panel"]] if panel is not None else [["headline"]]
    with drawing(STYLE):
        height = max(100 + 42 * len(scores), 430)  # the left column needs as much
        figure = Figure(figsize=(1320 / 72, height / 72), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.2, h_pad=0.15, wspace=0.03)  # type: ignore[union-attr, call-arg]
        axes = figure.subplot_mosaic([[*row, "categories"] for row in left], width_ratios=[5, 8])
        headline(total)(axes["headline"])
        axes["headline"].set_title(f"{points(total.change.mean)} points from RL", pad=8)
        categories(scores)(axes["categories"])
        axes["categories"].set_title(f"Held-out accuracy by category{note}", pad=16)
        if panel is not None:
            learning_curve(panel)(axes["panel"])
            axes["panel"].set_title(panel.title, pad=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path, dpi=PNG_DPI)


def headline(score: Score) -> Draw:
    """Both accuracies with their intervals over the level of guessing."""

    def draw(axes: Axes) -> None:
        rows = ((1, "before RL", score.before, BEFORE), (0, "after RL", score.after, AFTER))
        for y, _, interval, color in rows:
            axes.plot(
                [interval.low, interval.high], [y, y], color=color, lw=9, alpha=0.28, solid_capstyle="round"
            )
            axes.plot(interval.mean, y, "o", ms=12, color=color, clip_on=False)
            axes.annotate(
                f"{interval.mean:.1%}",
                (interval.high, y),
                xytext=(12, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=15,
                fontweight="bold",
            )
        axes.set_yticks([y for y, *_ in rows], [name for _, name, *_ in rows])
        axes.tick_params(axis="y", labelsize=11, labelcolor=INK, pad=9)  # clear of a mark at 0%
        axes.set_ylim(-0.6, 1.85)
        _chance(axes, score.chance, -0.6, 1.45)
        axes.annotate(
            f"guessing {score.chance:.0%}",
            (score.chance, 1.5),
            ha="center",
            va="bottom",
            color=MUTED,
            fontsize=9.5,
        )
        _share_axis(axes)
        axes.grid(axis="y", visible=False)

    return draw


def categories(scores: Sequence[Score], *, narrow: bool = False) -> Draw:
    """Accuracy by category before and after; the first row is all of them together."""

    def draw(axes: Axes) -> None:
        top = len(scores) - 1
        for index, score in enumerate(scores):
            y = top - index + (0.35 if index == 0 else 0)  # the first row is set apart
            for shift, interval, color in ((0.16, score.before, BEFORE), (-0.16, score.after, AFTER)):
                span = [interval.low, interval.high]
                axes.plot(span, [y + shift] * 2, color=color, lw=4.5, alpha=0.28, solid_capstyle="round")
                axes.plot(interval.mean, y + shift, "o", ms=7, color=color, clip_on=False)
            _chance(axes, score.chance, y - 0.36, y + 0.36)
            axes.text(
                1.03,
                y,
                points(score.change.mean),
                transform=axes.get_yaxis_transform(),
                va="center",
                color=INK,
                fontsize=11,
                fontweight="bold",
            )
            if not narrow and not score.change.is_point:
                axes.text(
                    1.115,
                    y,
                    f"{points(score.change.low, 0)} to {points(score.change.high, 0)}",
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    color=MUTED,
                    fontsize=9.5,
                )
        break_at, count = (16, "\nn={}") if narrow else (40, "  (n={})")
        names = [textwrap.fill(score.name, break_at) + count.format(score.n) for score in scores]
        axes.set_yticks([top + 0.35, *range(top - 1, -1, -1)], names)
        axes.tick_params(axis="y", labelsize=9.5 if narrow else 10.5, labelcolor=INK, length=0, pad=7)
        axes.set_ylim(-0.6, top + 0.35 + 0.6)
        axes.text(
            1.03,
            top + 1.0,
            "points",
            transform=axes.get_yaxis_transform(),
            color=MUTED,
            fontsize=9.5,
            va="bottom",
        )
        _share_axis(axes)
        axes.grid(axis="y", visible=False)

    return draw


def time_spent(seconds: Mapping[str, float], *, narrow: bool = False) -> Draw:
    """Seconds by part of the run, the longest first."""
    parts = sorted(seconds.items(), key=lambda part: part[1])
    total = sum(seconds.values())

    def draw(axes: Axes) -> None:
        values = [value for _, value in parts]
        axes.barh(range(len(parts)), values, height=0.62, color=AFTER, alpha=0.85)
        for y, value in enumerate(values):
            share = f" · {value / total:.0%}" if total else ""
            axes.annotate(
                f"{duration(value)}{share}",
                (value, y),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=9.5,
            )
        axes.set_yticks(range(len(parts)), [shortened(name, 18) for name, _ in parts])
        axes.tick_params(axis="y", labelsize=10.5, labelcolor=INK, length=0)
        axes.set_xlim(0, max([*values, 1e-9]) * (1.45 if narrow else 1.18))
        axes.set_ylim(-0.6, len(parts) - 0.4)
        axes.xaxis.set_visible(False)
        axes.grid(visible=False)
        axes.spines[["bottom", "left"]].set_visible(False)

    return draw


def learning_curve(panel: Panel) -> Draw:
    """A panel's lines over the steps."""

    def draw(axes: Axes) -> None:
        for curve, color in zip(panel.curves, (AFTER, THIRD, BEFORE)):
            label = curve.label if len(panel.curves) > 1 else None
            if panel.points:
                if curve.low is not None and curve.high is not None:
                    axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.16, lw=0)
                axes.plot(curve.steps, curve.values, "o-", ms=4.5, color=color, lw=1.8, label=label)
            else:
                axes.plot(curve.steps, curve.values, color=color, lw=0.9, alpha=0.3)
                axes.plot(curve.steps, smooth(curve.values), color=color, lw=1.9, label=label)
        if panel.marked_step is not None:
            axes.axvline(panel.marked_step, color=MUTED, lw=1, ls=(0, (3, 3)))
            steps = panel.curves[0].steps
            early = panel.marked_step - steps[0] < (steps[-1] - steps[0]) / 2  # label where there is room
            axes.annotate(
                "kept",
                (panel.marked_step, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(4 if early else -4, 2),
                textcoords="offset points",
                ha="left" if early else "right",
                color=MUTED,
                fontsize=9,
            )
        if panel.percent:
            low, high = axes.get_ylim()  # no share is below 0 or above 1
            axes.set_ylim(max(low, -0.04 * high), min(high, 1 + 0.04 * (1 - low)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 2):g}%")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6 if panel.wide else 4, integer=True))
        axes.set_xlabel(panel.xlabel)
        axes.margins(x=0.02)
        axes.grid(axis="x", visible=False)
        axes.spines["left"].set_visible(False)
        if len(panel.curves) > 1:
            axes.legend(loc="best", handlelength=1.2, borderaxespad=0.2)

    return draw


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a window of a tenth of the curve, narrower at both ends."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def shortened(name: str, length: int) -> str:
    """A name cut so that the figure beside it has room."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def points(share: float, digits: int = 1) -> str:
    """A change of a share in percentage points, with its sign."""
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _chance(axes: Axes, x: float, low: float, high: float) -> None:
    """A dashed mark at the level of guessing, from `low` to `high`."""
    axes.plot([x, x], [low, high], color=MUTED, lw=1.1, ls=(0, (2, 2)), zorder=1)


def _share_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="both", length=0)
