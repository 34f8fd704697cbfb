"""The report of a run: one HTML file that needs nothing else, made from what the run directory holds.

`python -m rlaif_fast.report.html RUN_DIR` makes it again. Responses, questions and names come from models
and datasets: the template escapes them, and the page forbids scripts and loading anything.
"""

from __future__ import annotations

import argparse
import base64
import importlib.resources
import io
import mimetypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.report import figures
from rlaif_fast.report.figures import HALF, NARROW, WIDE, Curve, Draw, Panel, Score, duration
from rlaif_fast.report.stats import paired_bootstrap, wilson_interval
from rlaif_fast.runs.folder import RunDir, read_jsonl
from rlaif_fast.video import FrameSampling, VideoError, load_clip, load_image, probe

STRIP_FRAMES = 6
STRIP_SIDE = 192  # pixels of a gallery frame's longer side, at most
PHASES = {"sft": "Before RL", "final": "After RL"}


def write_report(run_dir: RunDir, *, summary: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` and the PNG figures of a run, finished or not.

    Args:
        run_dir: The run.
        summary: Its summary, where `summary.json` is yet to be written; else that file is read, if there.

    Returns:
        The path of the report.
    """
    if summary is None:
        summary = run_dir.read_summary() if run_dir.finished else {}
    comparison = compare_predictions(run_dir)
    panels = learning_panels(list(read_jsonl(run_dir.metrics)))
    seconds = {name: float(value) for name, value in summary.get("seconds_by_stage", {}).items()}
    page = _template().render(
        name=run_dir.path.resolve().name,
        finished=bool(summary),
        facts=_facts(run_dir, summary),
        comparison=comparison,
        figures=_svg_figures(comparison, seconds),
        panels=[(panel, _panel_svg(panel)) for panel in panels],
        cards=gallery(run_dir),
        config=summary.get("config", {}),
        notes=summary.get("notes", []),
        versions=summary.get("versions", {}),
        strip_frames=STRIP_FRAMES,
    )
    run_dir.report.write_text(page, encoding="utf-8")
    _write_pngs(run_dir.figures, comparison, panels, seconds)
    return run_dir.report


# Accuracy before and after


@dataclass(frozen=True)
class Comparison:
    """Test accuracy before and after RL.

    Attributes:
        total: All questions.
        by_category: Each category, the largest gain first.
        fixed: Questions answered wrong before and right after.
        broken: Questions answered right before and wrong after.
        clips: Videos that the questions are about; 0 where the predictions do not say.
    """

    total: Score
    by_category: tuple[Score, ...]
    fixed: int
    broken: int
    clips: int


def compare_predictions(run_dir: RunDir) -> Comparison | None:
    """Compare the test predictions made before and after RL; None until both are there."""
    before = {record["example_id"]: record for record in read_jsonl(run_dir.predictions("sft"))}
    after = {record["example_id"]: record for record in read_jsonl(run_dir.predictions("final"))}
    pairs = [(before[name], after[name]) for name in after if name in before]
    if not pairs:
        return None
    categories = {new["category"] for _, new in pairs}
    scores = [_score(name, [pair for pair in pairs if pair[1]["category"] == name]) for name in categories]
    return Comparison(
        total=_score("all categories", pairs),
        by_category=tuple(sorted(scores, key=lambda score: (-score.change.mean, score.name))),
        fixed=sum(new["correct"] and not old["correct"] for old, new in pairs),
        broken=sum(old["correct"] and not new["correct"] for old, new in pairs),
        clips=len({_media(new) for _, new in pairs if _media(new)}),
    )


def _score(name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Score:
    old = [bool(before["correct"]) for before, _ in pairs]
    new = [bool(after["correct"]) for _, after in pairs]
    return Score(
        name=name,
        n=len(pairs),
        before=wilson_interval(sum(old), len(old)),
        after=wilson_interval(sum(new), len(new)),
        # Questions about one clip are not independent: whole clips are drawn.
        change=paired_bootstrap(
            old, new, clusters=[_media(after) or after["example_id"] for _, after in pairs]
        ),
        chance=float(np.mean([after["chance"] for _, after in pairs])),
    )


def _media(record: Mapping[str, Any]) -> str:
    """The first clip of a record; "" where there is none."""
    video = record.get("video") or ""
    return video if isinstance(video, str) else str(video[0])


# Learning curves


def learning_panels(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The learning curves that the recorded metrics allow."""

    def curve(stage: str, key: str, label: str = "") -> Curve | None:
        values = {
            line["step"]: line[key]
            for line in metrics
            if line["stage"] == stage and _is_number(line.get(key))
        }
        if len(values) < 2:
            return None
        steps = sorted(values)
        return Curve(label, np.array(steps), np.array([values[step] for step in steps]))

    panels = []

    def add(title: str, note: str, *curves: Curve | None, **options: Any) -> None:
        found = tuple(entry for entry in curves if entry is not None)
        if found:
            panels.append(Panel(title, note, found, **{"xlabel": "RL step", **options}))

    validation = _validation_curve(metrics)
    add(
        "Validation accuracy",
        "Greedy answers to held-out questions as RL goes on; the band is the 95% interval.",
        validation,
        points=True,
        percent=True,
        wide=True,
        marked_step=None if validation is None else int(validation.steps[np.argmax(validation.values)]),
    )
    add(
        "Agreement with the oracle",
        "The policy's own order of each group against the oracle's.",
        curve("rl", "ndcg", "nDCG"),
        curve("rl", "top1_agreement", "same best"),
        curve("rl", "kendall_tau", "Kendall tau"),
    )
    add(
        "Right answers sampled",
        "Share of the responses RL learns from.",
        curve("rl", "accuracy"),
        percent=True,
    )
    add("Groups without signal", "All tied or not ranked.", curve("rl", "no_signal"), percent=True)
    add("Entropy", "Of the next token; zero is no exploration.", curve("rl", "entropy"))
    add("SFT loss", "Cross-entropy of the reference answers.", curve("sft", "loss"), xlabel="SFT step")
    add(
        "Is the oracle being gamed?",
        "Kendall tau of its ranks with length, with the reference, and with itself blind.",
        curve("rl", "oracle/length_tau", "length"),
        curve("rl", "oracle/reference_tau", "reference"),
        curve("rl", "oracle/blind_tau", "blind"),
    )
    add("RL loss", "Policy loss and its KL term.", curve("rl", "loss"))
    add("KL", "Distance of the policy from its start, per token.", curve("rl", "kl"))
    return panels


def _validation_curve(metrics: Iterable[Mapping[str, Any]]) -> Curve | None:
    """Validation accuracy by RL step."""
    found = {
        line["step"]: line
        for line in metrics
        if (line["stage"], line.get("phase"), line.get("split")) == ("eval", "rl", "validation")
        and _is_number(line.get("accuracy"))
    }
    if len(found) < 2:
        return None
    steps = sorted(found)
    rows = [list(found[step].get("by_category", {}).values()) for step in steps]
    low = high = None
    if all(rows):
        counts = [(sum(row["correct"] for row in some), sum(row["n"] for row in some)) for some in rows]
        intervals = [wilson_interval(correct, n) for correct, n in counts]
        low = np.array([interval.low for interval in intervals])
        high = np.array([interval.high for interval in intervals])
    return Curve("", np.array(steps), np.array([found[step]["accuracy"] for step in steps]), low, high)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Gallery


@dataclass(frozen=True)
class Frame:
    """One frame of a strip: a data URI and its time in seconds."""

    uri: str
    time: float


@dataclass(frozen=True)
class Row:
    """One response of a group, or several that are the same in everything.

    Attributes:
        text: The response.
        count: How often it was sampled.
        oracle: Place in the oracle's order, 1 is best; None where it was not judged.
        policy: Place in the policy's own order.
        advantage: What GRPO_rank gave it.
        strength: |advantage| over the largest of the gallery, in [0, 1].
        oracle_share: 1 for the best place of the group, 0 for the last.
    """

    text: str
    count: int
    oracle: int | None
    policy: int | None
    advantage: float
    strength: float
    oracle_share: float


@dataclass(frozen=True)
class Answers:
    """What the policy answered at one phase: greedily, and in a sampled group."""

    title: str
    greedy: str | None
    correct: bool | None
    valid: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Card:
    """One clip of the gallery with its question.

    Attributes:
        category: Of the question.
        question: As it was asked.
        options: "A. text", for multiple choice.
        answer: The reference answer.
        frames: The strip; empty where the file cannot be read.
        problem: Why there is no strip.
        answers: Before and after RL.
    """

    category: str
    question: str
    options: tuple[str, ...]
    answer: str
    frames: tuple[Frame, ...]
    problem: str
    answers: tuple[Answers, ...]


def gallery(run_dir: RunDir) -> list[Card]:
    """The test clips that the run recorded samples of, in its order."""
    by_example: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in read_jsonl(run_dir.samples):
        by_example.setdefault(record["example_id"], {})[record["phase"]] = record
    correct = {
        (phase, record["example_id"]): bool(record["correct"])
        for phase in PHASES
        for record in read_jsonl(run_dir.predictions(phase))
    }
    sizes = [
        abs(advantage)
        for phases in by_example.values()
        for record in phases.values()
        for advantage in record["advantages"]
        if advantage is not None
    ]
    largest = max(sizes, default=0.0) or 1.0
    cards = []
    for name, phases in by_example.items():
        asked = phases["sft"] if "sft" in phases else phases["final"]
        frames, problem = _strip(_media(asked))
        answer = asked.get("answer") or ""
        options = tuple(
            f"{chr(ord('A') + index)}. {text}" for index, text in enumerate(asked.get("options") or ())
        )
        cards.append(
            Card(
                category=asked["category"],
                question=asked["question"],
                options=options,
                answer=next((option for option in options if option.startswith(f"{answer}. ")), answer),
                frames=frames,
                problem=problem,
                answers=tuple(
                    Answers(
                        title=PHASES[phase],
                        greedy=phases[phase].get("greedy"),
                        correct=correct.get((phase, name)),
                        valid=bool(phases[phase].get("valid", True)),
                        rows=_rows(phases[phase], largest),
                    )
                    for phase in PHASES
                    if phase in phases
                ),
            )
        )
    return cards


def _rows(record: Mapping[str, Any], largest: float) -> tuple[Row, ...]:
    """The responses of a group, the oracle's best first, equal ones merged."""
    oracle, policy = places(record["oracle_ranks"]), places(record["policy_ranks"])
    last = max((place for place in oracle if place is not None), default=1)
    counts: dict[tuple[str, int | None, int | None, float], int] = {}
    for text, first, second, advantage in zip(record["responses"], oracle, policy, record["advantages"]):
        key = (text, first, second, round(advantage or 0.0, 6))
        counts[key] = counts.get(key, 0) + 1
    rows = [
        Row(
            text=text,
            count=count,
            oracle=first,
            policy=second,
            advantage=advantage,
            strength=min(1.0, abs(advantage) / largest),
            oracle_share=0.0 if first is None or last == 1 else (last - first) / (last - 1),
        )
        for (text, first, second, advantage), count in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.oracle or len(oracle) + 1, row.policy or len(oracle) + 1)))


def places(ranks: Sequence[float | None]) -> list[int | None]:
    """Turn ranks, of which only the order counts, into places: 1 is best, equal ranks share a place."""
    known = [rank for rank in ranks if rank is not None]
    return [None if rank is None else 1 + sum(other < rank for other in known) for rank in ranks]


def _strip(path: str) -> tuple[tuple[Frame, ...], str]:
    """Evenly spaced frames of a clip, or why there are none."""
    if not path:
        return (), "The record names no clip."
    try:
        if (mimetypes.guess_type(path)[0] or "").startswith("image/"):
            clip = load_image(path)
        else:
            count = min(STRIP_FRAMES, probe(path).frames)
            clip = load_clip(path, sampling=FrameSampling(nframes=count, frame_factor=1))
    except VideoError as error:
        return (), str(error)
    return tuple(
        Frame(_png_uri(image), time) for image, time in zip(clip.frames.numpy(), clip.timestamps)
    ), ""


def _png_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((STRIP_SIDE, STRIP_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Figures and page


def _facts(run_dir: RunDir, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, on what and for how long, as far as it is known."""
    facts = []
    if "seconds" in summary:
        facts.append(("wall-clock time", duration(summary["seconds"])))
    if "peak_rss_bytes" in summary:
        facts.append(("peak memory", f"{summary['peak_rss_bytes'] / 1e9:.2f} GB"))
    if summary.get("machine"):
        facts.append(("machine", _machine_text(summary["machine"])))
    groups = responses = 0
    for record in read_jsonl(run_dir.rollouts):
        groups += 1
        responses += len(record["responses"])
    if groups:
        facts.append(("ranked by the oracle", f"{responses:,} responses in {groups:,} groups"))
    if "seed" in summary:
        facts.append(("seed", str(summary["seed"])))
    facts.append(("begun", f"{datetime.fromtimestamp(run_dir.created, timezone.utc):%Y-%m-%d %H:%M} UTC"))
    if summary.get("git_commit"):
        facts.append(("code", str(summary["git_commit"])[:10]))
    return facts


def _machine_text(machine: Any) -> str:
    if isinstance(machine, Mapping):
        return ", ".join(
            value if isinstance(value, str) else f"{key} {value}" for key, value in machine.items()
        )
    return str(machine)


def _svg(draw: Callable[[bool], Draw], label: str, wide_size: tuple[int, int], narrow_height: int) -> Markup:
    """A figure for wide pages and one for narrow ones; the style sheet shows the right one."""
    wide = figures.to_svg(draw(False), *wide_size, label)
    narrow = figures.to_svg(draw(True), NARROW, narrow_height, label)
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        Markup(wide), Markup(narrow)
    )


def _svg_figures(comparison: Comparison | None, seconds: Mapping[str, float]) -> dict[str, Markup]:
    """The figures that stand alone, by name; what there is no data for is missing."""
    found = {}
    if comparison is not None:
        total, scores = comparison.total, (comparison.total, *comparison.by_category)
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
            height,
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
    curves = [(panel.title, figures.learning_curve(panel)) for panel in panels]
    if curves:
        figures.to_png(folder / "curves.png", curves, (NARROW, 230), columns=min(4, len(curves)))
    if seconds:
        figures.to_png(
            folder / "time.png",
            [("Where the time went", figures.time_spent(seconds))],
            (WIDE, 60 + 28 * len(seconds)),
        )
    if comparison is not None:
        scores = (comparison.total, *comparison.by_category)
        validation = next((panel for panel in panels if panel.wide), None)
        figures.to_overview(folder / "overview.png", comparison.total, scores, validation)
        title = "Held-out accuracy before and after RL"
        figures.to_png(folder / "headline.png", [(title, figures.headline(comparison.total))], (WIDE, 190))
        figures.to_png(
            folder / "categories.png",
            [("Held-out accuracy by category", figures.categories(scores))],
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
    parser = argparse.ArgumentParser(
        prog="python -m rlaif_fast.report.html", description=write_report.__doc__
    )
    parser.add_argument("run_dir", help="the --output_dir of a run")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(RunDir.open(arguments.run_dir)))
    except RlaifFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
