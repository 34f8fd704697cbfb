"""The report of a run made up from real video files, hostile text and plausible numbers."""

import re

import numpy as np
import pytest
import yaml
from PIL import Image
from report_parts import CATEGORIES, COLORS, Page, make_run

from rlaif_fast.report.gallery import STRIP_FRAMES, gallery, places
from rlaif_fast.report.html import main, write_report
from rlaif_fast.runs.files import write_jsonl
from rlaif_fast.runs.folder import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "tiny-seed0", clips=2, sft_steps=60, rl_steps=50)


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text(encoding="utf-8")


def test_the_report_needs_nothing_else(html):
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert set(re.findall(r"url\(([^)]{1,2})", html)) <= {"#" + c for c in "abcdefghijklmnopqrstuvwxyz"}
    assert "@import" not in html
    policies = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_report_shows_the_result_and_how_it_was_obtained(run, html):
    summary = run.read_summary()
    text = Page(html).text
    gain = 100 * (summary["final_accuracy"] - summary["sft_accuracy"])
    assert f"{gain:+.1f} points" in text
    assert f"{summary['sft_accuracy']:.1%}" in text and f"{summary['final_accuracy']:.1%}" in text
    for category in CATEGORIES:
        assert category in text
    for shown in (
        "5 min 12 s",
        "1.32 GiB",
        "x86_64, 2 cores, no GPU",
        "400 responses in 50 groups",
        "1f2e3d4c5b",
    ):
        assert shown in text
    assert summary["notes"][0] in text
    assert "torch 2.13.0+cpu" in text and "label_noise" in text
    assert "This run has not finished" not in text


def test_the_gallery_holds_frames_of_the_clips_and_both_groups(run):
    first, second = gallery(run)
    assert (first.category, second.category) == ("action recognition", "attribute perception")
    assert len(first.frames) == STRIP_FRAMES and first.problem == ""
    assert [frame.time for frame in first.frames] == sorted(frame.time for frame in first.frames)
    for card, color in ((first, COLORS["red"]), (second, COLORS["blue"])):
        picture = _decoded(card.frames[0].uri)
        assert picture.shape == (64, 64, 3)
        assert np.abs(picture.astype(int) - color).sum(-1).min() < 60
    before, after = first.answers
    assert (before.title, before.correct, after.title, after.correct) == (
        "Before RL",
        False,
        "After RL",
        True,
    )
    assert [(row.count, row.oracle, row.policy) for row in before.rows] == [
        (2, 1, 4),
        (3, 3, 1),
        (1, 6, 6),
        (1, 6, 6),
        (1, 8, 8),
    ]
    assert before.rows[0].strength == 1.0 and before.rows[0].oracle_share == 1.0
    assert before.rows[-1].oracle_share == 0.0
    assert sum(row.count for row in after.rows) == 8


def _decoded(uri: str) -> np.ndarray:
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0, 1, 2], [1, 2, 3]),
        ([0, 0, 2], [1, 1, 3]),
        ([0, 0, 1], [1, 1, 3]),
        ([3, 3, 9], [1, 1, 3]),
        ([5, None, 1.5], [2, None, 1]),
        ([None, None], [None, None]),
    ],
)
def test_places_depend_on_the_order_alone(ranks, expected):
    assert places(ranks) == expected


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    run = RunDir.create(tmp_path / "run")
    write_jsonl(run.metrics, [{"stage": "rl", "step": step, "kl": step / 10} for step in (1, 2, 3)])
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "This run has not finished" in text
    assert "Learning curves" in text and "Accuracy by category" not in text
    assert [path.name for path in run.figures.iterdir()] == ["curves.png"]


def test_the_report_of_an_unfinished_run_knows_its_settings_and_keeps_no_figure_of_before(tmp_path):
    run = make_run(tmp_path / "run", clips=1, sft_steps=4, rl_steps=20)
    write_report(run)
    assert (run.figures / "overview.png").is_file() and (run.figures / "time.png").is_file()
    run.config.write_text(yaml.safe_dump(run.read_summary()["config"] | {"metric_for_best_model": "none"}))
    run.summary.unlink()
    run.predictions("final").unlink()
    line = {"stage": "eval", "phase": "rl", "split": "validation"}
    tau = {"oracle/length_tau": 0.1, "oracle/reference_tau": 1.0}
    write_jsonl(
        run.metrics,
        [{**line, "step": 0, "accuracy": 0.5}, {**line, "step": 9, "accuracy": 0.2}]
        + [{"stage": "rl", "step": step, **tau} for step in (1, 2)],
    )
    text = Page(write_report(run).read_text()).text
    assert "This run has not finished" in text and "directed advantage, 8 responses a group" in text
    assert "Does the oracle favour long answers?" in text and "being gamed" not in text
    assert "the start was kept" not in text
    assert [path.name for path in run.figures.iterdir()] == ["curves.png"]


def test_the_command_writes_the_same_report_again(tmp_path, capsys):
    run = RunDir.create(tmp_path / "run")
    write_jsonl(run.metrics, [{"stage": "rl", "step": step, "kl": step / 10} for step in (1, 2, 3)])
    html = write_report(run).read_text(encoding="utf-8")
    run.report.unlink()
    assert main([str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_text(encoding="utf-8") == html


def test_a_report_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys):
    run = RunDir.create(tmp_path / "run")
    write_jsonl(run.metrics, [{"stage": "rl", "step": step, "kl": step / 10} for step in (1, 2, 3)])
    run.figures.write_text("a file where the folder of the figures belongs")
    assert main([str(run.path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(run.path) in said


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "was not made by a run" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions-final.jsonl"])
def test_a_finished_run_whose_records_have_changed_gets_no_report(tmp_path, capsys, name):
    run = make_run(tmp_path / "run")
    before = run.report.read_bytes() if run.report.is_file() else None
    with (run.path / name).open("rb+") as file:
        file.truncate((run.path / name).stat().st_size - 20)
    assert main([str(run.path)]) == 2
    assert f"{name} is not as the run wrote it" in capsys.readouterr().err
    assert (run.report.read_bytes() if run.report.is_file() else None) == before
