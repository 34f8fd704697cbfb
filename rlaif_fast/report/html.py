"""The report of a run: one self-contained HTML file, made from the contents of the run directory.

`python -m rlaif_fast.report.html RUN_DIR` makes it again. Responses, questions and names come from models
and datasets: the template escapes them, and the page forbids scripts and loading anything.
"""

from __future__ import annotations

import importlib.resources
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from rlaif_fast.cli import run_command
from rlaif_fast.command_parser import CommandParser
from rlaif_fast.errors import writing
from rlaif_fast.outputs import write_atomically
from rlaif_fast.report import figures
from rlaif_fast.report.before_after import Comparison, compare_predictions
from rlaif_fast.report.figures import HALF, NARROW, WIDE, Draw, Panel, duration
from rlaif_fast.report.gallery import STRIP_FRAMES, gallery, media_of
from rlaif_fast.report.panels import learning_panels
from rlaif_fast.report.stats import share_interval
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir


def write_report(run_dir: RunDir, *, summary: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` and the PNG figures of a run, finished or not.

    Args:
        run_dir: The run.
        summary: Its summary, where `summary.json` is yet to be written; else that file is read, if there.

    Returns:
        The path of the report.

    Raises:
        UsageError: A record of a finished run has changed since.
    """
    if summary is None:
        summary = run_dir.read_summary() if run_dir.finished else {}
        run_dir.refuse_damaged_results(summary)
    comparison = compare_predictions(run_dir)
    config = summary.get("config") or _written_config(run_dir)
    oracle = str(config.get("oracle", ""))
    metric = str(summary.get("metric_for_best_model", config.get("metric_for_best_model", "accuracy")))
    panels = learning_panels(list(read_jsonl(run_dir.metrics)), oracle, metric)
    seconds = {name: float(value) for name, value in summary.get("seconds_by_stage", {}).items()}
    page = _template().render(
        name=run_dir.path.resolve().name,
        finished=bool(summary),
        facts=_facts(run_dir, summary),
        comparison=comparison,
        without_rl=config.get("max_steps") == 0,
        start_kept=any(panel.wide and panel.marked_step == 0 for panel in panels),
        figures=_svg_figures(comparison, seconds),
        panels=[(panel, _panel_svg(panel)) for panel in panels],
        cards=gallery(run_dir),
        config=config,
        notes=summary.get("notes", []),
        versions=summary.get("versions", {}),
        strip_frames=STRIP_FRAMES,
    )
    with writing(run_dir.path):
        write_atomically(run_dir.report, page)
        _write_pngs(run_dir.figures, comparison, panels, seconds)
    return run_dir.report


def _written_config(run_dir: RunDir) -> Mapping[str, Any]:
    """The configuration of a run that has not finished; empty if it cannot be read."""
    try:
        found = yaml.safe_load(run_dir.read_config() or "")
    except (yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _facts(run_dir: RunDir, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, on what and for how long, as far as known."""
    facts = []
    if "win_rate" in summary:
        facts.append(("test answers ranked above the start's, ties half", f"{summary['win_rate']:.1%}"))
        facts += _win_interval(run_dir)
    if "seconds" in summary:
        facts.append(("wall-clock time", duration(summary["seconds"])))
    if "peak_rss_bytes" in summary:
        facts.append(("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"))
    if summary.get("machine"):
        facts.append(("machine", str(summary["machine"])))
    groups = responses = 0
    for record in read_jsonl(run_dir.rollouts):
        groups += 1
        responses += len(record["responses"])
    if groups:
        facts.append(("sampled in RL", f"{responses:,} responses in {groups:,} groups"))
    if "seed" in summary:
        facts.append(("seed", str(summary["seed"])))
    facts.append(("begun", f"{datetime.fromtimestamp(run_dir.created, timezone.utc):%Y-%m-%d %H:%M} UTC"))
    if summary.get("git_commit"):
        facts.append(("code", str(summary["git_commit"])[:10]))
    return facts


def _win_interval(run_dir: RunDir) -> list[tuple[str, str]]:
    """The 95% interval of the win rate; questions about one clip are not independent."""
    rows = [row for row in read_jsonl(run_dir.predictions("final")) if "win" in row]
    if not rows:
        return []
    found = share_interval([row["win"] for row in rows], [media_of(row) or row["example_id"] for row in rows])
    return [("their 95% interval", f"{found.low:.1%} to {found.high:.1%}")]


def _svg(draw: Callable[[bool], Draw], label: str, wide_size: tuple[int, int], narrow_height: int) -> Markup:
    """A figure for wide pages and one for narrow ones; the style sheet shows the right one."""
    wide = figures.to_svg(draw(False), *wide_size, label)
    narrow = figures.to_svg(draw(True), NARROW, narrow_height, label)
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        Markup(wide), Markup(narrow)
    )


def _svg_figures(comparison: Comparison | None, seconds: Mapping[str, float]) -> dict[str, Markup]:
    """The standalone figures, by name; those without data are missing."""
    found = {}
    if comparison is not None:
        total, scores = comparison.total, comparison.drawn
        found["headline"] = _svg(
            lambda narrow: figures.headline(total),
            "Test accuracy before and after RL with 95% intervals",
            (HALF, 160),
            150,
        )
        height = 70 + 42 * len(scores)
        found["categories"] = _svg(
            lambda narrow: figures.categories(scores, narrow=narrow),
            "Test accuracy by category before and after RL with 95% intervals",
            (WIDE, height),
            70 + 62 * len(scores),
        )
    if seconds:
        height = 20 + 28 * len(seconds)
        found["time"] = _svg(
            lambda narrow: figures.time_spent(seconds, narrow=narrow),
            "Seconds spent in each part of the run",
            (WIDE, height),
            height,
        )
    return found


def _panel_svg(panel: Panel) -> Markup:
    draw = figures.learning_curve(panel)
    if panel.wide:
        return _svg(lambda narrow: draw, panel.title, (HALF, 200), 190)
    return Markup(figures.to_svg(draw, NARROW, 200, panel.title))


def _write_pngs(
    folder: Path, comparison: Comparison | None, panels: Sequence[Panel], seconds: Mapping[str, float]
) -> None:
    for name in ("curves", "time", "overview", "headline", "categories"):  # from an earlier report
        (folder / f"{name}.png").unlink(missing_ok=True)
    curves = [(panel.title, figures.learning_curve(panel)) for panel in panels]
    if curves:
        columns = 3 if len(curves) % 4 == 1 else 4  # no panel alone in the last row
        figures.to_png(folder / "curves.png", curves, (NARROW, 230), columns=min(columns, len(curves)))
    if seconds:
        figures.to_png(
            folder / "time.png",
            [("Where the time went", figures.time_spent(seconds))],
            (WIDE, 60 + 28 * len(seconds)),
        )
    if comparison is not None:
        scores, missing = comparison.drawn, comparison.left_out
        validation = next((panel for panel in panels if panel.wide), None)
        figures.to_overview(folder / "overview.png", comparison.total, scores, validation, missing)
        title = "Held-out accuracy before and after RL"
        legend = f"Held-out accuracy{missing}: grey before RL, green after, dashed guessing"
        figures.to_png(folder / "headline.png", [(title, figures.headline(comparison.total))], (WIDE, 190))
        figures.to_png(
            folder / "categories.png",
            [(legend, figures.categories(scores))],
            (WIDE, 110 + 42 * len(scores)),
        )


def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["points"] = figures.points
    text = importlib.resources.files("rlaif_fast.report").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report of a run again; returns the exit code."""
    parser = CommandParser(prog="python -m rlaif_fast.report.html", description=write_report.__doc__)
    parser.add_argument("run_dir", type=Path, help="the --output_dir of a run")
    arguments = parser.parse_args(argv)

    def command() -> int:
        print(write_report(RunDir.open(arguments.run_dir)))
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
