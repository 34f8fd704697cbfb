"""Beside lmms-eval: the same scores, and our policy as its model."""

from __future__ import annotations

import random

import numpy as np
import pytest
from benchmark_parts import VIDEOMME_ROW, run

from rlaif_fast.data.benchmarks import read_benchmark
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.records import read_records
from rlaif_fast.oracle import RankRequest, build_oracle

pytest_plugins = ("benchmark_parts",)


def made_up_replies(count: int) -> list[tuple[str, str]]:
    """(reply, right letter) as models write to Video-MME's prompt: a letter, with or without its text."""
    draw = random.Random(0)
    forms = (
        "{0}",
        "{0}.",
        "({0})",
        "{0}. {1}",
        "The answer is {0}.",
        "The best answer is: {0}",
        "Answer: {0}",
        "{0}: {1}",
    )
    texts = dict(zip("ABCD", ("One.", "Two.", "Three.", "Four.")))
    letters = [(draw.choice("ABCD"), draw.choice("ABCD")) for _ in range(count)]
    return [(draw.choice(forms).format(said, texts[said]), right) for said, right in letters]


def test_videomme_scores_as_lmms_eval_does(monkeypatch, tmp_path):
    """On 200 made-up replies, through its own functions, where it is installed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    utils = pytest.importorskip("lmms_eval.tasks.videomme.utils", exc_type=ImportError)
    rules = build_oracle("reference", max_invalid_fraction=None)
    theirs, ours = [], []
    for number, (reply, right) in enumerate(made_up_replies(200)):
        row = VIDEOMME_ROW | {"answer": right, "question_id": str(number)}
        theirs.append(utils.videomme_process_results(row, [reply])["videomme_perception_score"])
        options = tuple(option[3:] for option in row["options"])
        asked = RankRequest("r", row["question"], (reply,), reference=right, options=options)
        ours.append(rules.is_correct(asked, reply))
    score = utils.videomme_aggregate_results(theirs)
    assert 15 < score < 35
    assert 100 * sum(ours) / len(ours) == pytest.approx(score, abs=1e-9)


def test_lmms_eval_gets_the_answers_of_the_policy(videomme, model, monkeypatch, tmp_path):
    """Through its own registry and its own kind of request."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pytest.importorskip("lmms_eval.models", exc_type=ImportError)
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from rlaif_fast.evals.lmms_eval import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    played = registry.get_model_class("rlaif_fast").create_from_arg_string(
        f"pretrained={model},fps=4", {"batch_size": 3, "device": "cpu", "max_batch_size": None}
    )
    items = [item for item in read_benchmark("videomme", videomme) if "bad" not in str(item.example.seen)][:4]
    played.task_dict = {"videomme": {"test": [{"path": item.example.seen[0].path} for item in items]}}

    def asked(given, place=0, visuals=lambda doc: [doc["path"]]):
        arguments = (items[place].example.asked, given, visuals, place, "videomme", "test")
        return Instance(
            "generate_until", arguments, place, {"task": "videomme", "doc_id": place, "repeats": 1}
        )

    texts = played.generate_until(
        [asked({"max_new_tokens": 4, "temperature": 0}, place) for place in range(4)]
    )
    assert run(videomme, model, tmp_path / "out") == 0
    records = {record.id: record.prediction for record in read_records(tmp_path / "out/items.jsonl")}
    assert texts == [records[item.example.id] for item in items]
    [cut] = played.generate_until([asked({"max_new_tokens": 4, "until": [texts[0].split()[0]]})])
    assert cut == ""
    for size in (0, -3, "auto"):
        with pytest.raises(UsageError, match=f"batch_size: expected 1 or more, got {size!r}"):
            type(played)(str(model), batch_size=size)
    with pytest.raises(UsageError, match="greedily"):
        played.generate_until([asked({"temperature": 0.7})])
    with pytest.raises(UsageError, match="got ndarray"):
        played.generate_until([asked({}, visuals=lambda doc: [np.zeros(3)])])


@pytest.mark.parametrize(
    ("text", "until", "reasons", "expected"),
    [
        ("B\n\nbecause", ["\n\n"], False, "B\n\nbecause"),
        ("Let me see.\n\nThe answer is B", "\n\n", False, "Let me see.\n\nThe answer is B"),
        ("<think>A?\n\nno</think>\n\nB", ["\n\n"], False, "B"),
        ("A?\nno</think>\n\nB\nC", ["\n"], True, "B"),
        ("<think>A?</think>\n<answer>B</answer>", ["\n\n"], False, "B"),
        ("it may be A", ["\n\n"], True, ""),
        ("it may be A", None, False, "it may be A"),
        ("B. because", ["", "."], False, "B"),
    ],
)
def test_lmms_eval_is_told_what_stands_behind_the_reasoning(
    text, until, reasons, expected, monkeypatch, tmp_path
):
    """Its tasks stop at a blank line by default, and that is where reasoning ends and an answer begins."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pytest.importorskip("lmms_eval.models", exc_type=ImportError)
    from rlaif_fast.evals.lmms_eval import said

    assert said(text, until, reasons=reasons) == expected
