"""One object scores answers, for reward, selection and report; without answers the run's oracle chooses."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import SMALL, in_a_file

from rlaif_fast import train as train_module
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import CircuitBreaker, ShuffledOracle, build_oracle
from rlaif_fast.oracle.base import Ranking, RankRequest
from rlaif_fast.oracle.feedback import CorruptedOracle
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.trainer import datasets
from rlaif_fast.trainer.evaluation import EvalResult, Prediction, compare_with, evaluate
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.scoring import check_references, choose_metric, rules, scorer_by_name, scorer_of

THINKING = r"<answer>(.*?)</answer>"


def request(reference, *responses, **more):
    return RankRequest(id="0", question="?", responses=responses, reference=reference, **more)


def longest(request):
    """An oracle function: the longer, the better."""
    return [float(len(text)) for text in request.responses]


# --- the scorer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reference", "response", "right"),
    [
        ({"extract": THINKING}, "red", "<think>blue?</think><answer>red</answer>", True),
        ({}, "red", "<think>blue?</think><answer>red</answer>", True),
        ({}, "red", "<think>red</think><answer>blue</answer>", False),
        ({"extract": THINKING}, "12", "it is <answer>12</answer>", True),
        ({"tolerance": 0.1}, "100", "105", True),
        ({}, "100", "105", False),
        ({"tolerance": 0.1, "extract": r"= (\S+)"}, "100", "x = 95", True),
    ],
)
@pytest.mark.parametrize("wrapped", ["bare", "breaker", "shuffled", "corrupted"])
def test_the_runs_own_oracle_says_what_is_right(options, reference, response, right, wrapped):
    own = build_oracle("reference", max_invalid_fraction=None, **options)
    around = {
        "bare": lambda o: o,
        "breaker": CircuitBreaker,
        "shuffled": lambda o: CircuitBreaker(ShuffledOracle(CorruptedOracle(o, kind="gaussian"))),
        "corrupted": lambda o: CircuitBreaker(CorruptedOracle(o, kind="flips")),
    }[wrapped](own)
    scorer = scorer_of(around, options)
    assert scorer is own
    assert scorer.is_correct(request(reference, response), response) is right
    assert scorer_by_name("reference", options).is_correct(request(reference, response), response) is right


def test_an_ensemble_that_holds_a_reference_oracle_scores_by_it():
    members = [
        {"name": "callable", "function": f"{__name__}:longest"},
        {"name": "reference", "tolerance": 0.5},
    ]
    ensemble = build_oracle("ensemble", members=members)
    for scorer in (
        scorer_of(ensemble, {"members": members}),
        scorer_by_name("ensemble", {"members": members}),
    ):
        assert isinstance(scorer, ReferenceOracle) and scorer.tolerance == 0.5


def test_an_oracle_of_another_package_that_knows_the_answers_is_asked():
    class Capitals:
        name = "capitals"

        def rank(self, requests):
            return [Ranking((0,) * len(r.responses)) for r in requests]

        def is_correct(self, request, response):
            return response.isupper()

    own = Capitals()
    assert scorer_of(CircuitBreaker(own), {}) is own


def test_a_judge_shares_its_answer_span_with_the_rules():
    judge = SimpleNamespace(name="judge", rank=None)
    scorer = scorer_of(judge, {"extract": THINKING, "model": "m"})
    assert scorer.is_correct(
        request("B", "A? <answer>B</answer>", options=("x", "y")), "A? <answer>B</answer>"
    )


# --- the choice ---------------------------------------------------------------------------------------------

FORM = {"form": r"(\w+) ball"}
WORDS = Example(id="1", question="?", answer="a man opens the red door slowly")
SHORT = Example(id="2", question="?", answer="red")
LETTER = Example(id="3", question="?", answer="B", options=("x", "y"))
NUMBER = Example(id="4", question="?", answer="7")
FACTS = Example(id="5", question="?", answer="red ball", metadata=FORM)
NOTHING = Example(id="6", question="?")
BLANK = Example(id="7", question="?", answer="  ")
FUNCTION = {"function": "test_scoring:longest"}


@pytest.mark.parametrize(
    ("oracle", "options", "rows", "metric"),
    [
        ("reference", {}, [SHORT, LETTER, NUMBER, FACTS], "accuracy"),
        ("reference", {}, [WORDS], "oracle"),
        ("reference", {}, [WORDS, LETTER, NUMBER], "accuracy"),
        ("callable", FUNCTION, [WORDS, SHORT], "oracle"),
        ("callable", FUNCTION, [SHORT], "oracle"),
        ("callable", FUNCTION, [LETTER, NUMBER, FACTS, SHORT], "accuracy"),
        ("callable", FUNCTION, [NOTHING], "oracle"),
        ("callable", FUNCTION, [BLANK, BLANK], "oracle"),
        ("callable", FUNCTION, [NOTHING, NOTHING, LETTER], "oracle"),
        ("callable", FUNCTION, [NOTHING, LETTER, LETTER], "accuracy"),
        ("corrupted", {"inner": "reference", "kind": "flips"}, [SHORT], "accuracy"),
        ("corrupted", {"inner": {"name": "callable", **FUNCTION}, "kind": "flips"}, [SHORT], "oracle"),
    ],
)
def test_the_metric_follows_the_answers(oracle, options, rows, metric):
    assert choose_metric("auto", oracle, options, rows)[0] == metric


def test_the_metric_that_is_asked_for_is_taken_or_refused():
    for asked in ("accuracy", "oracle", "none"):
        metric, why = choose_metric(asked, "reference", {}, [WORDS])
        assert metric == asked and "asked for" in why
    with pytest.raises(UsageError, match="accuracy needs answers, and no validation row has one"):
        choose_metric("accuracy", "callable", FUNCTION, [NOTHING, BLANK])
    with pytest.raises(UsageError, match="metric_for_best_model: expected auto"):
        TrainConfig(metric_for_best_model="f1")
    with pytest.raises(UsageError, match="early_stopping_patience: expected 0 where"):
        TrainConfig(metric_for_best_model="none", early_stopping_patience=2)


def test_rows_without_answers_are_refused_where_the_oracle_lives_on_them():
    with pytest.raises(UsageError, match="none of the 2 rl rows has one"):
        check_references("reference", {}, [NOTHING, BLANK])
    with pytest.raises(UsageError, match="ranks by reference answers"):
        check_references("shuffled", {"inner": "reference"}, [NOTHING])
    check_references("reference", {}, [NOTHING, SHORT])
    check_references("callable", FUNCTION, [NOTHING])
    with pytest.raises(UsageError, match="embedding ranks by reference answers"):
        check_references("embedding", {"model": "some/encoder"}, [NOTHING])


def test_an_ensemble_without_answers_is_refused_where_too_few_members_can_vote():
    """By default a group needs all of them, so none would be ranked."""
    members = {"members": ["reference", {"name": "callable", **FUNCTION}]}
    bare = RankRequest(id="0", question="?", responses=("a", "bb"))
    for least, ranked in ((None, False), (1, True), (2, False)):
        options = members if least is None else members | {"min_members": least}
        [ranking] = build_oracle("ensemble", max_invalid_fraction=None, **options).rank([bare])
        assert ranking.valid is ranked
        if ranked:
            check_references("ensemble", options, [NOTHING])
            continue
        with pytest.raises(UsageError, match="ensemble ranks by reference answers"):
            check_references("ensemble", options, [NOTHING])


def test_of_a_model_that_reasons_what_stands_behind_it_is_scored():
    """Whatever the oracle, where the template opened the reasoning."""
    asked = request("B", "x", options=("red", "blue"))
    for reasons in (False, True):
        for scorer in (
            scorer_of(
                build_oracle("callable", max_invalid_fraction=None, **FUNCTION), FUNCTION, reasons=reasons
            ),
            scorer_by_name("callable", FUNCTION, reasons=reasons),
        ):
            assert scorer.is_correct(asked, "maybe the answer is B") is not reasons  # cut off on the way
            assert scorer.is_correct(asked, "maybe A</think>\n\nB") is True
    own = rules({"extract": r"= (\w)"}, reasons=True)
    assert own.is_correct(asked, "it = B")


# --- the comparison with the start --------------------------------------------------------------------------


class Longest:
    name = "longest"

    def __init__(self):
        self.asked = []

    def rank(self, requests):
        self.asked += requests
        none = (None, None)
        return [
            Ranking(none, error="cannot")
            if "?" in r.responses[0]
            else Ranking(tuple(int(len(t) < max(map(len, r.responses))) for t in r.responses))
            for r in requests
        ]


def test_wins_ties_losses_and_no_verdict():
    rows = [Example(id=str(i), question="?") for i in range(6)]
    prompts = [SimpleNamespace(example=row, clips=()) for row in rows]
    texts = ["longer", "same", "a", "ab", "x", "new"]
    before = {"0": "long", "1": "same", "2": "abc", "3": "cd", "4": "?"}
    oracle = Longest()
    assert compare_with(prompts, texts, oracle, before) == [1.0, 0.5, 0.0, 0.5, None, None]
    assert [r.responses for r in oracle.asked] == [("long", "longer"), ("abc", "a"), ("cd", "ab"), ("?", "x")]
    assert compare_with(prompts, texts, None, {}) == [None] * 6


def test_evaluation_scores_what_has_an_answer():
    class Prompts:
        def __call__(self, rows):
            return [SimpleNamespace(example=row, clips=()) for row in rows]

        def prefetch(self, rows):
            assert not rows  # there is one step

    rows = [SHORT, NOTHING, BLANK]
    rollout = SimpleNamespace(texts=["red", "x", "y"], finished=torch.tensor([True, False, True]))
    sampler = SimpleNamespace(sample=lambda prompts, *_: rollout)
    result = evaluate(
        rows,
        Prompts(),
        sampler,
        scorer=ReferenceOracle(),
        max_new_tokens=4,
        oracle=Longest(),
        opponents={"2": "r", "6": "xx"},
    )
    assert [p.correct for p in result.predictions] == [True, None, None]
    assert [p.finished for p in result.predictions] == [True, False, True]
    assert (result.accuracy, result.win_rate) == (1.0, 0.5)
    assert result.by_category() == {"all": {"accuracy": 1.0, "n": 1, "correct": 1}}
    nothing = EvalResult((Prediction(NOTHING, "x", None),))
    assert math.isnan(nothing.accuracy) and math.isnan(nothing.win_rate) and nothing.by_category() == {}


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Generated rows with whole paths, as a list of JSON objects."""
    from rlaif_fast.data import SyntheticConfig, make_dataset

    small = SyntheticConfig(
        seed=1, sft_clips=12, rl_clips=0, validation_clips=0, test_clips=0, questions_per_clip=2
    )
    made = make_dataset(tmp_path_factory.mktemp("made"), small)
    found = [json.loads(line) for line in made.sft.read_text().splitlines()]
    return [
        {"video": str(made.root / row["video"]), "question": row["question"], "answer": row["answer"]}
        for row in found
    ]


def train(tmp_path, data, capsys, **changes):
    values = SMALL | {
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "data": tmp_path / "data.jsonl",
    }
    values |= {"holdout_fraction": 0.2, "sft_steps": 2, "report": "true", "max_steps": 4} | changes
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    code = train_module.main(in_a_file(values, tmp_path / "run.yaml"))
    output = capsys.readouterr()
    return code, tmp_path / "run", output.out + output.err


def test_training_without_any_answer(tmp_path, rows, capsys):
    bare = [{key: row[key] for key in ("video", "question")} for row in rows]
    options = {"oracle": "callable", "oracle_options": json.dumps(FUNCTION), "learning_rate": 0.01}
    code, folder, output = train(tmp_path, bare, capsys, sft="none", **options)
    assert code == 0, output
    assert "chosen by: oracle" in output and "win rate against the start" in output
    evals = [
        row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "eval" and row["phase"] == "rl"
    ]
    assert [row["step"] for row in evals] == [0, 2, 4]
    assert all(row["accuracy"] is None for row in evals)
    assert all(0.0 <= row["win_rate"] <= 1.0 for row in evals[1:])
    index = json.loads((folder / "checkpoints/index.json").read_text())
    best = max(evals[1:], key=lambda row: row["win_rate"])  # the first of equals
    assert index["best"] == (f"rl-{best['step']:06d}" if best["win_rate"] > 0.5 else "sft")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final_accuracy"] is None and summary["metric_for_best_model"] == "oracle"
    assert 0.0 <= summary["win_rate"] <= 1.0
    page = (folder / "report.html").read_text()
    assert "chosen by: oracle" in page and "Validation win rate" in page
    assert f"<dd>{summary['win_rate']:.1%}</dd>" in page
    [start] = [row for row in read_jsonl(folder / "metrics.jsonl") if row.get("phase") == "sft"]
    assert start["step"] == 0  # nothing was trained before it


def test_a_reference_oracle_without_answers_is_refused_at_once(tmp_path, rows, capsys):
    bare = [{key: row[key] for key in ("video", "question")} for row in rows]
    code, folder, output = train(tmp_path, bare, capsys, sft="none")
    assert code == 2 and "none of the" in output and not folder.exists()


def test_final_figures_use_the_options_of_the_oracle(tmp_path, rows, capsys):
    """What is taken out of a response is empty, which the form of the answers lets pass; no other response is."""
    options = {"oracle_options": json.dumps({"extract": "^()"}), "max_steps": 1, "sft": "none"}
    asked = [row | {"answer": "red", "metadata": {"form": "()(?:red)?"}} for row in rows]
    code, folder, output = train(tmp_path, asked, capsys, **options)
    assert code == 0, output
    assert json.loads((folder / "summary.json").read_text())["final_accuracy"] == 1.0
    rl = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["accuracy"] for row in rl] == [1.0]


def test_no_metric_keeps_the_last(tmp_path, rows, capsys):
    code, folder, output = train(tmp_path, rows, capsys, metric_for_best_model="none")
    assert code == 0, output
    index = json.loads((folder / "checkpoints/index.json").read_text())
    assert index["best"] == index["last"] == "rl-000004"


def test_validation_rows_without_an_answer_are_told(tmp_path):
    data = [
        Example(
            id=str(i), question="?", answer=None if i == 0 else "B", options=("x", "y"), videos=(f"{i}.mp4",)
        )
        for i in range(4)
    ]
    notes = []
    splits = {"sft": [], "rl": [], "validation": data[:3], "test": data[3:]}
    datasets.drop_unanswered(splits, notes.append)
    assert [row.id for row in splits["validation"]] == ["1", "2"]
    assert notes == ["Left out: 1 validation rows without an answer."]
    with pytest.raises(UsageError, match="no row of the test split has an answer"):
        datasets.drop_unanswered({"validation": data[3:], "test": data[:1]})
