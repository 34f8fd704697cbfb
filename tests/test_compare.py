"""Tables of several runs, from summaries whose figures are known."""

import json
import math

import pytest

from rlaif_fast.compare import main
from rlaif_fast.comparison.runs import (
    category_table,
    group_results,
    markdown_table,
    read_result,
    results_table,
)
from rlaif_fast.errors import UsageError
from rlaif_fast.report.html import main as report
from rlaif_fast.runs.folder import RunDir


def finished(path, seed, before, after, *, advantage="directed", categories=None, **changes):
    run = RunDir.create(path)
    run.write_summary(
        {
            "sft_accuracy": before,
            "final_accuracy": after,
            "by_category": categories
            or {
                "action": {"sft": before, "final": after, "n": 60},
                "counting": {"sft": 0.5, "final": 0.25, "n": 40},
            },
            "seconds": 300.0 + 2 * seed,
            "peak_rss_bytes": 1e9 * (1 + seed),
            "seed": seed,
            "config": {"advantage": advantage, "beta": 0.04, "seed": seed, "output_dir": str(path)},
            "git_commit": "0123456789abcdef",
            "versions": {"torch": "2.13.0"},
            "machine": "2 cores",
        }
        | changes
    )
    return path


@pytest.fixture
def runs(tmp_path):
    return [
        finished(tmp_path / "b", 1, 0.50, 0.75),
        finished(tmp_path / "a", 0, 0.40, 0.60),
        finished(tmp_path / "c", 0, 0.40, 0.45, advantage="oracle"),
    ]


def test_seeds_share_a_row_that_is_named_by_what_differs(runs):
    groups = group_results([read_result(path) for path in runs])
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("advantage=directed", [0, 1]),
        ("advantage=oracle", [0]),
    ]
    first, second = results_table(groups).splitlines()[2:]
    figures = "45.0% | 67.5% | +22.5 | +20.0 +25.0 | counting -25.0 | 301 s | 1.86 GiB"
    assert first == f"| advantage=directed | 0 1 | {figures} |"
    assert second == (
        "| advantage=oracle | 0 | 40.0% | 45.0% | +5.0 | +5.0 | counting -25.0 | 300 s | 0.93 GiB |"
    )


def test_a_single_group_is_named_by_its_folder(runs):
    groups = group_results([read_result(runs[0])])
    assert [group.label for group in groups] == ["b"]


def test_category_table_takes_the_mean_over_seeds_and_leaves_holes(runs, tmp_path):
    other = finished(
        tmp_path / "d",
        0,
        0.5,
        0.5,
        advantage="zscore",
        categories={"action": {"sft": 0.5, "final": 0.5, "n": 9}},
    )
    lines = category_table(group_results([read_result(path) for path in [*runs, other]])).splitlines()
    assert lines[0] == "| category | advantage=directed | advantage=oracle | advantage=zscore |"
    assert lines[2] == "| action | 45.0% → 67.5% | 40.0% → 45.0% | 50.0% → 50.0% |"
    assert lines[3] == "| counting | 50.0% → 25.0% | 50.0% → 25.0% | – |"


def test_the_same_run_twice_is_refused(runs):
    with pytest.raises(UsageError, match="same settings and seed 0"):
        group_results([read_result(runs[1]), read_result(runs[1])])


def test_a_summary_that_lacks_something_is_named(tmp_path):
    run = RunDir.create(tmp_path / "run")
    run.write_summary({"seed": 0, "config": {}})
    with pytest.raises(UsageError, match="has no 'sft_accuracy'"):
        read_result(run.path)


def test_a_run_whose_answers_were_not_scored_is_named(runs, tmp_path, capsys):
    bare = finished(tmp_path / "bare", 3, None, None, by_category={})
    assert main([*map(str, runs), str(bare)]) == 2
    assert f"{bare}: no test answer was scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sft_accuracy", "0.5"),
        ("final_accuracy", math.nan),
        ("by_category", [1]),
        ("by_category", {"action": 3}),
        ("by_category", {"action": {"sft": "0.5", "final": 0.5, "n": 9}}),
        ("seconds", None),
        ("seconds_by_stage", {"sft": "long"}),
        ("peak_rss_bytes", "1 GiB"),
        ("seed", "0"),
        ("config", "beta: 0.04"),
        ("versions", ["torch"]),
        ("notes", None),
        ("sha256", [1]),
    ],
)
@pytest.mark.parametrize("command", [main, report])
def test_a_value_of_a_wrong_type_is_named(runs, capsys, command, name, value):
    summary = RunDir(runs[0]).summary
    values = json.loads(summary.read_text())
    del values["sha256"]  # a seal would tell
    summary.write_text(json.dumps({**values, name: value}))
    assert command([str(runs[0])]) == 2
    assert f"summary.json: {name} is not what this version writes" in capsys.readouterr().err


def test_a_run_without_a_category_is_named(tmp_path, capsys):
    assert main([str(finished(tmp_path / "bare", 3, 0.5, 0.5, categories={}, by_category={}))]) == 2
    assert "no test answer was scored" in capsys.readouterr().err


def test_the_command_prints_tables_and_where_they_come_from(runs, capsys):
    assert main(["--categories", *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("|---|") == 2
    assert "100 held-out questions a run" in printed
    assert "- 2 cores; torch 2.13.0; commit 0123456789" in printed


@pytest.mark.parametrize(("kind", "what"), [("data", "rows"), ("metadata", "metadata"), ("media", "media")])
def test_runs_of_a_seed_with_other_test_data_are_named(runs, capsys, kind, what):
    for path, digest in zip(runs, ("w", "x", "y")):  # b of seed 1, a and c of seed 0
        RunDir(path).began_with(kind, {"test": digest})
    assert main([*map(str, runs)]) == 0
    assert f"- Tested on different {what} (seed 0): a and c." in capsys.readouterr().out
    assert main([*map(str, runs[:2])]) == 0
    assert "different" not in capsys.readouterr().out


def test_the_command_refuses_an_unfinished_run(tmp_path, capsys):
    RunDir.create(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "did not finish" in message and message.count("\n") == 1


def test_cells_cannot_break_the_table():
    assert markdown_table(["a", "b"], [["x|y", "1\n2"]]).splitlines()[2] == "| x\\|y | 1 2 |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--output_dir", "zz", "--tables", "a"], "--output_dir, --tables: not read with RUN"),
        (["run", "--workers", "7"], "--workers: not read with RUN"),
        (["run", "--workers", "0"], "--workers: not read with RUN"),
        (["run", "--report_only"], "--report_only: not read with RUN"),
        (["--config", "c.yaml", "--categories"], "--categories: not read with --config"),
        (["--config", "c.yaml", "--report_only", "--workers", "3"], "--workers: not read with --report_only"),
    ],
)
def test_what_the_other_way_reads_is_refused(capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
