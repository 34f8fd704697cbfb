"""Texts of models and datasets in the report: shown as they are, never markup."""

from __future__ import annotations

import pytest
from report_parts import Page, make_run

from rlaif_fast.report.gallery import gallery
from rlaif_fast.report.html import write_report
from rlaif_fast.runs.files import read_jsonl, write_jsonl
from rlaif_fast.runs.folder import RunDir

ATTACK = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quotes" $x$ {{ 777*777 }}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "tiny-seed0", clips=2, sft_steps=60, rl_steps=50)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A small run whose every text is an attack, whose clip is gone and whose group was not ranked."""
    run = RunDir.create(tmp_path_factory.mktemp("hostile") / "a & <b>")
    record = {
        "example_id": ATTACK,
        "category": ATTACK,
        "video": f"/missing/{ATTACK}",
        "question": ATTACK,
        "options": [ATTACK, "other"],
        "answer": "A",
        "responses": [ATTACK, ""],
        "oracle_ranks": [None, None],
        "policy_ranks": [0, 1],
        "advantages": [0.0, 0.0],
        "valid": False,
        "confidence": 0.0,
        "greedy": ATTACK,
    }
    write_jsonl(run.samples, [{"phase": phase, **record} for phase in ("sft", "final")])
    for phase in ("sft", "final"):
        rows = [{"example_id": ATTACK, "category": ATTACK, "correct": phase == "final", "chance": 0.5}]
        write_jsonl(run.predictions(phase), rows)
    summary = {
        "notes": [ATTACK],
        "config": {"algorithm": ATTACK, "advantage": ATTACK, "num_generations": ATTACK, ATTACK: ATTACK},
        "versions": {ATTACK: ATTACK},
        "machine": ATTACK,
        "git_commit": ATTACK,
        "seconds_by_stage": {ATTACK: 1.0},
    }
    write_report(run, summary=summary)
    return run


def test_no_text_of_a_model_or_a_dataset_becomes_markup(hostile):
    page = Page(hostile.report.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    assert not [
        attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)
    ]
    assert page.text.count(ATTACK) >= 20
    assert "603729" not in page.text  # what {{ 777*777 }} would have become
    assert "a & <b>" in page.text


def test_every_hostile_text_is_shown_as_it_is(hostile):
    text = Page(hostile.report.read_text(encoding="utf-8")).text
    for shown in (
        f"A. {ATTACK}",
        f"Reference: A. {ATTACK}",
        f"No frames: /missing/{ATTACK}: does not exist",
        f"✓{ATTACK}",
        f"✗{ATTACK}",
        "The oracle could not rank this group.",
        "(empty)",
    ):
        assert shown in text


def test_options_behind_the_26th_have_the_labels_of_the_question(hostile, tmp_path):
    run = RunDir.create(tmp_path / "run")
    [record, _] = read_jsonl(hostile.samples)
    write_jsonl(run.samples, [record | {"options": [f"o{n}" for n in range(30)], "answer": "AB"}])
    [card] = gallery(run)
    assert card.options[25:28] == ("Z. o25", "AA. o26", "AB. o27") and card.answer == "AB. o27"


def test_the_summary_given_is_not_written(hostile):
    assert not hostile.finished
