"""A comparison from its file to its report: real runs of a few steps, and intervals that are known."""

from dataclasses import replace

import numpy as np
import pytest
from comparison_parts import write_config

from rlaif_fast.comparison import results
from rlaif_fast.comparison.plan import read_plan
from rlaif_fast.comparison.report import accuracy_table, category_table, describe, draw_curves, write_report
from rlaif_fast.comparison.results import (
    Cell,
    gain,
    over_seeds,
    read_outcome,
    read_table,
    two_level_bootstrap,
)
from rlaif_fast.errors import UsageError
from rlaif_fast.runs.files import read_jsonl, write_jsonl
from rlaif_fast.runs.folder import RunDir

MAIN = {"seeds": [1], "arms": ["grpo"], "feedback": ["exact"], "baseline": "grpo"}


def test_the_bootstrap_knows_both_levels():
    def seed(change, clusters=400):
        return np.column_stack([np.full(clusters, change), np.ones(clusters)])

    same = two_level_bootstrap([seed(0.1)] * 5)
    assert [same.mean, same.low, same.high] == pytest.approx([0.1, 0.1, 0.1])
    apart = two_level_bootstrap([seed(change) for change in (-0.2, -0.1, 0.1, 0.2, 0.5)])
    assert apart.mean == pytest.approx(0.1)
    # Means of five draws with replacement: their deviation is that of the seeds over the root of five.
    deviation = np.std([-0.2, -0.1, 0.1, 0.2, 0.5]) / 5**0.5
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    rng = np.random.default_rng(0)
    alone = [np.column_stack([rng.normal(0.1, 1.0, 400), np.ones(400)])]
    one = two_level_bootstrap(alone)
    assert one.high - one.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert over_seeds(alone) == one
    few = over_seeds([seed(change) for change in (0.0, 0.1, 0.2)])
    assert [few.low, few.high] == pytest.approx([0.1 - 4.303 * 0.1 / 3**0.5, 0.1 + 4.303 * 0.1 / 3**0.5])


def mark_all(run, phase, *, correct):
    """Make all answers of a finished run right or wrong."""
    rows = [row | {"correct": correct} for row in read_jsonl(run.predictions(phase))]
    write_jsonl(run.predictions(phase), rows)
    run.write_summary(run.read_summary())


def finished_run(folder, metrics, video):
    run = RunDir.create(folder)
    for phase in ("sft", "final"):
        rows = [{"example_id": str(n), "category": "c", "video": video, "correct": n < 2} for n in range(4)]
        write_jsonl(run.predictions(phase), rows)
    write_jsonl(run.metrics, metrics)
    run.write_summary({"config": {"num_generations": 4}, "seconds": 1.0, "peak_rss_bytes": 1})
    return read_outcome(folder)


def test_a_line_of_the_metrics_stands_for_the_steps_since_the_one_before(tmp_path):
    def line(step, **figures):
        return {"stage": "rl", "step": step, "time": float(step), **figures}

    usual = {"completion_length": 10.0, "groups": 2, "oracle/groups": 2.0}
    every = finished_run(tmp_path / "every", [line(n, **usual) for n in range(1, 5)], "a.mp4")
    some = finished_run(tmp_path / "some", [line(2, **usual), line(4, **usual)], "a.mp4")
    assert every.sampled_tokens == some.sampled_tokens == 4 * 10 * 2 * 4
    assert every.oracle_groups == some.oracle_groups == 8
    # No file of the third step could be read.
    lost = finished_run(tmp_path / "lost", [line(1, **usual), line(2), line(3, **usual)], "a.mp4")
    assert (lost.sampled_tokens, lost.oracle_groups) == (160.0, 4.0)


def test_questions_without_a_video_are_no_cluster(tmp_path):
    assert len(set(finished_run(tmp_path / "a", [], "a.mp4").video.values())) == 1
    assert len(set(finished_run(tmp_path / "b", [], None).video.values())) == 4


@pytest.mark.parametrize("accuracies", [[0.25, 0.5], [None, None], []])
def test_the_curves_are_drawn_of_what_was_scored_on_validation(tmp_path, accuracies):
    metrics = [
        {"stage": "eval", "phase": "rl", "step": n, "time": 1.0, "accuracy": value}
        for n, value in enumerate(accuracies)
    ]
    plan = read_plan(write_config(tmp_path, tables={"main": MAIN}))
    finished_run(plan.arm_folder(1, "exact", "grpo"), metrics, "a.mp4")
    assert write_report(plan).is_file() and (plan.output_dir / "main.png").is_file()


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("data", "4 rows, b", "tested on other rows than"),
        ("media", "b", "tested on other media than"),
        ("data", "4 rows, a", None),
        (None, None, None),
    ],
)
def test_runs_that_were_tested_on_other_data_are_not_compared(tmp_path, kind, other, words):
    """Their questions may have the same names."""
    named = {"grpo": {"algorithm": "grpo"}, "ranks": {"algorithm": "grpo_rank"}}
    table = MAIN | {"arms": [*named]}
    plan = read_plan(write_config(tmp_path, arms=named, tables={"main": table}))
    arms = plan.tables[0].arms
    for arm, data in zip(arms, ("4 rows, a" if kind == "data" else "a", other)):
        folder = plan.arm_folder(1, "exact", arm)
        finished_run(folder, [], "a.mp4")
        if kind is not None:
            RunDir(folder).began_with(kind, {"test": data})
    if words is None:
        assert len(read_table(plan, plan.tables[0])) == 2
        return
    with pytest.raises(UsageError, match=words):
        read_table(plan, plan.tables[0])


def test_the_start_is_the_mean_over_the_seeds(tmp_path):
    """Whatever number of arms has finished on each."""
    named = {"grpo": {"algorithm": "grpo"}, "ranks": {"algorithm": "grpo_rank"}}
    plan = read_plan(
        write_config(tmp_path, arms=named, tables={"main": MAIN | {"seeds": [1, 2], "arms": [*named]}})
    )
    for seed, arm in ((1, "grpo"), (1, "ranks"), (2, "grpo")):
        finished_run(plan.arm_folder(seed, "exact", arm), [], "a.mp4")
    run = RunDir(plan.arm_folder(2, "exact", "grpo"))
    mark_all(run, "sft", correct=False)
    table = accuracy_table(plan.tables[0], read_table(plan, plan.tables[0]))
    assert "| start | 25.0% |" in table


def test_the_curves_show_every_arm_and_every_seed_to_its_end(tmp_path, monkeypatch):
    """An arm that finished under the second kind alone had no name; a seed that stopped early cut the rest."""
    from matplotlib import pyplot

    names = [f"arm {n}" for n in range(11)]
    plan = read_plan(
        write_config(
            tmp_path,
            arms={name: {"advantage": "zscore"} for name in names},
            tables={"main": MAIN | {"arms": names, "baseline": names[0], "feedback": ["exact", "noise"]}},
        )
    )

    def line(step):
        return {"stage": "eval", "phase": "rl", "step": step, "time": float(step), "accuracy": step / 10}

    short = finished_run(tmp_path / "short", [line(0), line(1)], "a.mp4")
    long = finished_run(tmp_path / "long", [line(n) for n in range(4)], "a.mp4")
    both = {1: short, 2: long}
    cells = {("exact", names[0]): Cell(both, gain([*both.values()]), None)}
    cells |= {("noise", name): Cell({1: long}, gain([long]), None) for name in names[1:]}
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)  # so that it can be looked at
    draw_curves(plan.tables[0], cells, tmp_path / "curves.png")
    monkeypatch.undo()
    [figure] = drawn
    first, time = figure.axes[:2]
    assert [text.get_text() for text in first.get_legend().get_texts()] == names
    assert len({handle.get_color() for handle in first.get_legend().get_lines()}) == len(names)
    assert [len(each.get_xdata()) for each in first.get_lines()] == [2, 4, 2]
    assert [each.get_alpha() for each in time.get_lines()] == [0.3, 0.3, None]
    assert time.get_lines()[1].get_xdata().tolist() == [0.0, 1.0, 2.0, 3.0]
    pyplot.close(figure)


@pytest.mark.parametrize("seeds", [2, 3, 5, 40])
@pytest.mark.parametrize(
    "between", [0.15, 0.02]
)  # the seeds' spread, where that of a seed's 50 videos is 0.1
def test_an_interval_over_few_seeds_holds_the_truth(seeds, between, monkeypatch):
    """A lead of a few seeds that all point one way was bold, and was called one of 95%."""
    monkeypatch.setattr(results, "RESAMPLES", 500)
    rng, held, runs = np.random.default_rng(1), 0, 200
    for _ in range(runs):
        up = rng.normal(0.25, between / 2, size=seeds).clip(
            0, 0.5
        )  # of a video's answer changing for the better
        changes = [rng.choice([1.0, -1.0, 0.0], 50, p=[share, 0.5 - share, 0.5]) for share in up]
        interval = over_seeds([np.column_stack([change, np.ones(50)]) for change in changes])
        held += interval.low <= 0 <= interval.high
    assert held / runs >= 0.92  # 0.95 less two deviations


def test_one_seed_says_what_it_does_not_know(tmp_path):
    named = {"grpo": {"algorithm": "grpo"}, "ranks": {"algorithm": "grpo_rank"}}
    plan = read_plan(write_config(tmp_path, arms=named, tables={"main": MAIN | {"arms": [*named]}}))
    one = finished_run(tmp_path / "run", [], "a.mp4")
    for seeds in (1, 3):
        runs = dict.fromkeys(range(seeds), one)
        cells = {
            ("exact", "grpo"): Cell(runs | {9: one}, gain([one]), None),
            ("exact", "ranks"): Cell(runs, gain([one]), gain([one])),
        }
        told = "An interval of one seed knows nothing" in describe(plan.tables[0], cells)
        assert told == (seeds == 1)


def test_a_lead_of_one_video_has_no_interval_and_is_not_bold(tmp_path):
    named = {"grpo": {"algorithm": "grpo"}, "ranks": {"algorithm": "grpo_rank"}}
    plan = read_plan(write_config(tmp_path, arms=named, tables={"main": MAIN | {"arms": [*named]}}))
    for arm in named:
        finished_run(plan.arm_folder(1, "exact", arm), [], "a.mp4")
    run = RunDir(plan.arm_folder(1, "exact", "ranks"))
    mark_all(run, "final", correct=True)
    table = accuracy_table(plan.tables[0], read_table(plan, plan.tables[0]))
    assert "| ranks | 100.0% (+50.0, no interval) |" in table


def test_a_category_that_an_arm_was_not_asked_is_a_dash(tmp_path):
    """Its mean over no seed was +nan; and where an arm has finished under another kind of feedback alone, no head."""
    named = {"grpo": {"algorithm": "grpo"}, "ranks": {"algorithm": "grpo_rank"}}
    plan = read_plan(write_config(tmp_path, arms=named, tables={"main": MAIN | {"arms": [*named]}}))
    table = plan.tables[0]
    one, two = (finished_run(tmp_path / str(n), [], "a.mp4") for n in range(2))
    two = replace(two, category=dict.fromkeys(two.category, "d"))
    cells = {
        ("exact", "grpo"): Cell({1: one, 2: two}, gain([one, two]), None),
        ("exact", "ranks"): Cell({1: one}, gain([one]), None),
    }
    assert "| d | +0.0 | – |" in category_table(table, cells) and "nan" not in category_table(table, cells)
    assert category_table(table, {("noise", "grpo"): cells["exact", "grpo"]}) == ""


def test_a_dollar_sign_in_a_name_is_a_dollar_sign(tmp_path):
    plan = read_plan(write_config(tmp_path, tables={"main": MAIN}))
    name = r"$\frac{a$"
    table = replace(plan.tables[0], feedback=(name,))
    line = {"stage": "eval", "phase": "rl", "step": 0, "time": 1.0, "accuracy": 0.5}
    found = finished_run(tmp_path / "run", [line, line], "a.mp4")
    cells = {(name, table.arms[0]): Cell({1: found}, gain([found]), None)}
    draw_curves(table, cells, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
