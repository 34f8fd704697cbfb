"""Figures and numbers of the report: what is drawn, counted and paired."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from report_parts import Page, make_run

from rlaif_fast.data.schema import Example
from rlaif_fast.evaluate import print_table
from rlaif_fast.oracle import build_oracle
from rlaif_fast.report import figures
from rlaif_fast.report.html import compare_predictions, write_report
from rlaif_fast.report.outcome import accuracy_summary, notes_on_answers, notes_on_data
from rlaif_fast.report.panels import learning_panels
from rlaif_fast.report.stats import MAX_ROWS
from rlaif_fast.runs.files import write_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.options import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "tiny-seed0", clips=2, sft_steps=60, rl_steps=50)


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text(encoding="utf-8")


def test_figures_follow_the_page_and_their_names_do_not_collide(html):
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawn) == 3 * 2 + 1 * 2 + 7  # three figures and a panel for two widths, seven panels for one
    for svg in drawn:
        for name, color in figures.COLORS.items():
            assert color not in svg, name
    assert any("var(--after)" in svg for svg in drawn)
    identifiers = [
        attributes["id"]
        for tag, attributes in Page(html).tags
        if tag in ("path", "clippath") and "id" in attributes
    ]
    assert identifiers and len(identifiers) == len(set(identifiers))


def test_png_figures_are_pictures(run, html):
    names = {"headline", "categories", "curves", "time", "overview"}
    assert {path.stem for path in run.figures.glob("*.png")} == names
    for name in names:
        with Image.open(run.figures / f"{name}.png") as image:
            assert image.width >= 1400
            assert len(image.convert("RGB").resize((300, 200)).getcolors(60_000)) > 50


def test_of_hundreds_of_categories_the_figures_draw_those_with_the_most_questions_and_the_table_all(tmp_path):
    """Two thousand drawn whole took minutes and gigabytes, behind the last step of a run."""
    run = RunDir.create(tmp_path)
    names = [f"of {number:03d}" for number in range(200) for _ in range(1 + (number % 50 == 7))]
    for phase in ("sft", "final"):
        rows = [
            {"example_id": str(place), "category": name, "video": f"v{place}", "chance": 0.25}
            | {"correct": phase == "final" and place % 3 == 0}
            for place, name in enumerate(names)
        ]
        write_jsonl(run.predictions(phase), rows)
    comparison = compare_predictions(run)
    assert comparison is not None and len(comparison.by_category) == 200
    total, *drawn = comparison.drawn
    assert total is comparison.total and len(drawn) == MAX_ROWS
    # Of those with one question the first by name, however well they did; in the order of the gains.
    twice = {name for name in names if names.count(name) == 2}
    once = [name for name in dict.fromkeys(names) if name not in twice][: MAX_ROWS - len(twice)]
    assert {score.name for score in drawn} == twice | set(once)
    gains = [score.change.mean for score in drawn]
    assert gains == sorted(gains, reverse=True)
    page = write_report(run).read_text()
    assert "the 40 of 200 categories with the most questions; the table has all" in page
    assert all(f"<td>{name}</td>" in page for name in names)
    for name in ("overview", "categories"):
        with Image.open(run.figures / f"{name}.png") as image:
            assert image.height < 5000


@pytest.mark.filterwarnings("error")
def test_one_category_in_any_script_is_drawn_whole_and_without_a_warning(tmp_path):
    """Of one category the overview was so low that both accuracies lay on each other."""
    run = RunDir.create(tmp_path)
    for phase in ("sft", "final"):
        row = {"example_id": "a", "category": "视频 🙂 $x$", "video": "v", "chance": 0.25, "correct": True}
        write_jsonl(run.predictions(phase), [row])
    evaluation = {"time": 1.0, "stage": "eval", "phase": "rl", "split": "validation", "accuracy": 0.5}
    write_jsonl(run.metrics, [{**evaluation, "step": step} for step in range(2)])
    assert "视频 🙂 $x$" in write_report(run).read_text()
    with Image.open(run.figures / "overview.png") as image:
        assert image.height > image.width / 4


def test_comparison_pairs_questions_by_name(tmp_path):
    run = RunDir.create(tmp_path)
    assert compare_predictions(run) is None
    row = {"chance": 0.25, "category": "a"}
    write_jsonl(
        run.predictions("sft"),
        [{**row, "example_id": str(i), "correct": i < 2, "video": f"v{i % 2}"} for i in range(5)],
    )
    write_jsonl(
        run.predictions("final"),
        [
            {**row, "example_id": str(i), "correct": i in (1, 2, 3), "video": f"v{i % 2}"}
            for i in (3, 2, 1, 0)
        ],
    )
    comparison = compare_predictions(run)
    assert comparison is not None
    assert (comparison.fixed, comparison.broken, comparison.clips) == (2, 1, 2)
    assert (comparison.total.n, comparison.total.before.mean, comparison.total.after.mean) == (4, 0.5, 0.75)
    assert comparison.total.change.mean == 0.25 and comparison.total.chance == 0.25
    assert comparison.total.change.low == 0.0  # one clip gained nothing: whole clips are drawn
    assert comparison.total.change.high == 0.5


def test_summary_and_report_count_the_same_questions(tmp_path):
    """Of a file that could be read only once; a category of such files was said to have begun at 0."""
    run = RunDir.create(tmp_path)
    right = {"sft": {"0": True, "1": False, "2": True}, "final": {"0": True, "1": True, "3": True}}
    for phase, answers in right.items():
        rows = [
            {"example_id": name, "category": "b" if name == "3" else "a", "video": name, "chance": 0.25}
            | {"correct": value}
            for name, value in answers.items()
        ]
        write_jsonl(run.predictions(phase), rows)
    summary = accuracy_summary(run)
    assert summary == {
        "sft_accuracy": 0.5,
        "final_accuracy": 1.0,
        "by_category": {"a": {"sft": 0.5, "final": 1.0, "n": 2}},
    }
    total = compare_predictions(run).total
    assert (total.before.mean, total.after.mean, total.n) == (0.5, 1.0, 2)
    assert notes_on_answers(run, 5) == [
        "Left out: 3 of 5 test questions, whose files could not be read before RL or after it."
    ]
    run.predictions("sft").unlink()
    assert accuracy_summary(run) == {"sft_accuracy": None, "final_accuracy": None, "by_category": {}}


def test_learning_panels_take_the_last_word_on_a_step_and_skip_gaps():
    metrics = [
        {"stage": "rl", "step": 1, "loss": 1.0, "kl": None},
        {"stage": "rl", "step": 2, "loss": 5.0, "kl": 0.5},
        {"stage": "rl", "step": 2, "loss": 2.0, "kl": 0.5},
        {"stage": "sft", "step": 1, "loss": 3.0},
    ]
    for step, accuracy in ((0, 0.25), (10, 0.75), (20, 0.75)):
        rows = {"a": {"n": 8, "correct": int(8 * accuracy), "accuracy": accuracy}}
        line = {"stage": "eval", "phase": "rl", "split": "validation", "step": step}
        metrics.append({**line, "accuracy": accuracy, "by_category": rows})
    metrics.append({"stage": "eval", "phase": "sft", "split": "validation", "step": 1, "accuracy": 0.1})
    validation, loss = learning_panels(metrics)
    assert (validation.title, loss.title) == ("Validation accuracy", "RL loss")
    assert loss.curves[0].values.tolist() == [1.0, 2.0]
    curve = validation.curves[0]
    assert curve.steps.tolist() == [0, 10, 20] and curve.values.tolist() == [0.25, 0.75, 0.75]
    assert validation.marked_step == 10
    assert curve.low is not None and curve.high is not None
    assert (curve.low < curve.values).all() and (curve.values < curve.high).all()


def test_the_step_marked_is_that_of_the_checkpoint_that_was_kept():
    """By the oracle's verdicts where they chose it; the last where nothing did."""
    line = {"stage": "eval", "phase": "rl", "split": "validation"}
    accuracies = {0: 0.5, 10: 0.4, 20: 0.3}
    metrics = [{**line, "step": step, "accuracy": value} for step, value in accuracies.items()]
    assert [panel.marked_step for panel in learning_panels(metrics)] == [0]
    assert [panel.marked_step for panel in learning_panels(metrics, metric="none")] == [20]
    for record, win_rate in zip(metrics[1:], (0.75, 0.5)):
        record["win_rate"] = win_rate
    accuracy, wins = learning_panels(metrics, metric="oracle")
    assert (accuracy.marked_step, wins.marked_step, wins.title) == (10, 10, "Validation win rate")
    axes = Figure().subplots()
    figures.learning_curve(accuracy)(axes)  # whose best is another step
    assert [text.get_text() for text in axes.texts] == ["kept"]
    assert wins.curves[0].steps.tolist() == [0, 10, 20]
    assert wins.curves[0].values.tolist() == [0.5, 0.75, 0.5]
    worse = [metrics[0], *({**record, "win_rate": 0.25} for record in metrics[1:])]
    assert {panel.marked_step for panel in learning_panels(worse, metric="oracle")} == {0}


def test_a_run_whose_last_checkpoint_is_kept_is_not_said_to_be_its_start(tmp_path):
    run = make_run(tmp_path / "run", clips=1, sft_steps=4, rl_steps=20)
    line = {"stage": "eval", "phase": "rl", "split": "validation"}
    write_jsonl(run.metrics, [{**line, "step": 0, "accuracy": 0.5}, {**line, "step": 9, "accuracy": 0.2}])
    summary = run.read_summary()
    summary["config"] |= {"algorithm": "ppo_rm"}
    kept = Page(write_report(run, summary=summary).read_text()).text
    assert "before and after are one policy" in kept and "ppo_rm, 8 responses a group" in kept
    last = Page(write_report(run, summary=summary | {"metric_for_best_model": "none"}).read_text()).text
    assert "before and after are one policy" not in last


def test_a_run_without_rl_says_so(tmp_path):
    """It said that RL put 0 answers right and 0 wrong."""
    run = make_run(tmp_path / "run", clips=1, sft_steps=4, rl_steps=20)
    summary = run.read_summary()
    summary["config"] |= {"max_steps": 0}
    page = Page(write_report(run, summary=summary).read_text()).text
    assert "No RL took place (max_steps is 0)" in page and "RL put" not in page


def test_a_mark_at_zero_hides_no_name():
    nothing = figures.Interval(0.0, 0.0, 0.3)
    score = figures.Score("all categories", 8, nothing, nothing, figures.Interval(0.0, 0.0, 0.0), 0.25)
    for draw in (figures.headline(score), figures.categories([score])):
        figure = Figure(figsize=(9, 3), dpi=72)
        axes = figure.subplots()
        draw(axes)
        figure.canvas.draw()
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        left = min(axes.transData.transform((0, 0))[0] - mark.get_markersize() / 2 for mark in marks)
        assert all(name.get_window_extent().x1 < left for name in axes.get_yticklabels())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_share_below_nothing_or_above_all_is_on_an_axis(share):
    axes = Figure().add_subplot()
    curve = figures.Curve("", np.arange(4), np.full(4, share))
    figures.learning_curve(figures.Panel("", "", (curve,), "RL step", percent=True))(axes)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    low, high = axes.get_ylim()
    shown = [label for place, label in zip(axes.get_yticks(), labels) if low <= place <= high]
    assert low < share < high and len(shown) > 2
    assert all(0 <= float(label.rstrip("%")) <= 100 for label in shown)


def test_rows_without_a_category_are_told_of_once(tmp_path, capsys):
    """The line `all` stood twice, and the bars of all questions too."""
    run = make_run(tmp_path / "run", clips=1, sft_steps=4, rl_steps=20)
    for phase in ("sft", "final"):
        rows = [json.loads(line) | {"category": "all"} for line in run.predictions(phase).open()]
        write_jsonl(run.predictions(phase), rows)
    found = compare_predictions(run)
    assert found is not None and found.by_category == () and found.total.n > 0
    assert "all categories" in Page(write_report(run, summary=run.read_summary()).read_text()).text
    print_table({"accuracy": 0.5, "by_category": {"all": {"accuracy": 0.5, "n": 2}}, "chance": {"all": 0.25}})
    assert capsys.readouterr().out.count("all ") == 1


def test_clips_that_all_changed_alike_have_no_interval(tmp_path):
    """Of a handful of questions that nothing changed in, +0.0 to +0.0 was called an interval of 95%."""
    run = RunDir.create(tmp_path)
    for phase in ("sft", "final"):
        rows = [{"example_id": str(n), "category": "a", "video": f"v{n}", "chance": 0.2} for n in range(4)]
        write_jsonl(run.predictions(phase), [row | {"correct": False} for row in rows])
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "No interval, since every clip changed alike, on 4 held-out questions" in text
    axes = Figure().subplots()
    figures.categories(compare_predictions(run).drawn)(axes)
    assert {each.get_text() for each in axes.texts} == {"+0.0", "points"}


def test_a_win_rate_has_an_interval_over_clips(tmp_path):
    """A share of a handful of answers stood alone, as if it were exact."""
    run = RunDir.create(tmp_path)
    rows = [
        {"example_id": str(n), "category": "a", "video": f"v{n // 2}", "correct": None, "win": float(n < 6)}
        for n in range(8)
    ]
    write_jsonl(run.predictions("final"), rows)
    summary = accuracy_summary(run)
    assert summary["win_rate"] == 0.75
    page = write_report(run, summary=summary).read_text()
    assert "<dd>75.0%</dd>" in page
    assert "<dt>their 95% interval</dt><dd>27.7% to 95.9%</dd>" in page  # of four clips


def test_smoothing_keeps_constants_lengths_and_means():
    assert figures.smooth(np.full(37, 2.5)) == pytest.approx(np.full(37, 2.5))
    wave = np.array([0.0, 1.0] * 50)
    smoothed = figures.smooth(wave)
    assert len(smoothed) == 100 and np.abs(smoothed - 0.5).max() < 0.25


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (12, "12 s")],
)
def test_durations_read_well(seconds, shown):
    assert figures.duration(seconds) == shown


def test_long_names_leave_room():
    assert figures.shortened("counting", 8) == "counting"
    assert figures.shortened("object reasoning", 8) == "object…"


def test_points_have_a_sign():
    assert (figures.points(0.1234), figures.points(-0.1), figures.points(0, 0)) == ("+12.3", "−10.0", "+0")


def test_the_reference_oracle_shows_no_curve_that_is_one_by_design():
    metrics = [
        {
            "stage": "rl",
            "step": step,
            "oracle/length_tau": 0.1,
            "oracle/reference_tau": 1.0,
            "oracle/blind_tau": 1.0,
        }
        for step in (1, 2)
    ]
    [length] = learning_panels(metrics, "reference")
    assert [curve.label for curve in length.curves] == [""]
    [all_three] = learning_panels(metrics, "api")
    assert [curve.label for curve in all_three.curves] == ["length", "reference", "blind"]


def test_what_is_said_of_weak_labels_is_true_of_the_run():
    """Nothing where none was taught; of the oracle only where it ranks against the right answers."""
    rows = [Example(id=str(n), question="?", metadata={"corrupted": n < 2}) for n in range(5)]

    def said(oracle, **changes):
        config = TrainConfig(**changes)
        made = build_oracle(oracle, function=len) if oracle == "callable" else build_oracle(oracle)
        data = SimpleNamespace(sft=rows, metric="accuracy")
        return " ".join(notes_on_data(SimpleNamespace(config=config, data=data, oracle=made)))

    assert "2 of 5 supervised answers" in said("reference") and "the undoing of that noise" in said(
        "reference"
    )
    assert "supervised answers" not in said("reference", sft="none")
    for other in (said("callable"), said("reference", oracle_shuffle=True)):
        assert "2 of 5 supervised answers" in other and "the undoing" not in other
