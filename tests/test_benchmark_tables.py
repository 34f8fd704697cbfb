"""The table and the figure of an evaluation."""

from __future__ import annotations

import dataclasses

import pytest
from benchmark_parts import record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from rlaif_fast.errors import UsageError
from rlaif_fast.evals.tables import as_text, draw_bars, table_of, write_tables
from rlaif_fast.report.stats import wilson_interval


def test_a_figure_of_hundreds_of_groups_draws_those_with_the_most_questions(tmp_path):
    records = [record(number, f"v{number}", True, topic=f"t{number // 2}") for number in range(401)]
    lines = table_of(records)
    write_tables(tmp_path, lines, records, "accuracy")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + len(lines) == 1 + 2 + 201
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.height < 5000


def test_the_legend_of_the_bars_hides_none_of_them():
    records = [record(number, f"v{number}", True) for number in range(20)]
    figure = Figure(figsize=(9, 2), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, table_of(records, records))
    FigureCanvasAgg(figure).draw()
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent().padded(-1))


def test_the_table_counts_what_could_not_be_asked():
    """With a judge too, of whose questions it is; what has options is none."""
    graded = dataclasses.replace(record(0, "v0", True), pred=True, score=4)
    lost = [dataclasses.replace(record(n, f"v{n}", False), prediction=None) for n in (1, 2)]
    [whole, _] = table_of([graded, *lost], for_judge={"0", "1"})
    assert (whole.unanswered, whole.judged, whole.judge_accuracy, whole.judge_score) == (2, 1, 0.5, 2.0)
    head, row, *_ = as_text([whole]).splitlines()
    assert head.split()[:3] == ["n", "unanswered", "accuracy"] and row.split()[:4] == [
        "all",
        "3",
        "2",
        "33.3%",
    ]
    assert "unanswered" not in as_text(table_of([graded]))


def test_the_table_by_hand():
    records = [record(i, f"v{i // 3}", i % 2 == 0, duration="short" if i < 6 else "long") for i in range(9)]
    before = [record(i, f"v{i // 3}", False, duration="x") for i in range(9)]
    lines = {(line.group, line.value): line for line in table_of(records, before)}
    assert [lines[key].n for key in (("all", "all"), ("task type", "counting"), ("duration", "long"))] == [
        9,
        9,
        3,
    ]
    assert lines["all", "all"].accuracy.mean == pytest.approx(5 / 9)
    assert lines["duration", "long"].change.mean == pytest.approx(2 / 3)
    one_video = lines["duration", "long"].accuracy
    assert one_video.low < 0.2 and one_video.high > 0.9  # whatever number of questions
    # Videos: 2, 1, 2 of 3, so no more apart than independent answers would be.
    assert lines["all", "all"].accuracy == wilson_interval(5, 9)
    low, high = lines["all", "all"].change.low, lines["all", "all"].change.high
    assert low < 5 / 9 < high and low == pytest.approx(1 / 3) and high == pytest.approx(2 / 3)
    assert "duration" in as_text(list(lines.values()))
    assert as_text(list(lines.values())).splitlines()[-2].endswith("+66.7            none")  # of one video
    with pytest.raises(UsageError, match="same questions"):
        table_of(records, before[1:])
    with pytest.raises(
        UsageError, match=r"its '0' asked 'q' \(right: 'B'\), this evaluation 'q' \(right: 'A'\)"
    ):
        table_of(records, [dataclasses.replace(before[0], answer="B"), *before[1:]])
