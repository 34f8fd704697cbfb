"""Functions and files as oracles, and the command line around them."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from oracle_file_parts import write

from rlaif_fast.data.reader import read_examples
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import Ranking, RankRequest, build_oracle
from rlaif_fast.oracle.callable import CallableOracle
from rlaif_fast.oracle.ensemble import EnsembleOracle
from rlaif_fast.oracle.records import row_request
from rlaif_fast.oracle.replay import ReplayOracle
from rlaif_fast.video.base import Clip


def by_length(request):
    return [len(text) or None for text in request.responses]


def request(responses=("a", "bbb", "", "cc", "dd"), name="0:row", **kwargs):
    return RankRequest(name, kwargs.pop("question", "?"), tuple(responses), **kwargs)


def test_a_function_is_an_oracle():
    assert build_oracle("callable", function=by_length).rank([request()])[0].ranks == (2, 0, None, 1, 1)
    ranks = CallableOracle(function=by_length, returns="ranks").rank([request()])[0].ranks
    assert ranks == (0, 2, None, 1, 1)
    named = CallableOracle(function="os.path:commonprefix")
    assert named.identity.startswith("callable/2 ")
    assert "by_length" in CallableOracle(function=by_length).identity


@pytest.mark.parametrize(
    "function",
    [
        lambda request: 1 / 0,
        lambda request: [1.0],
        lambda request: None,
        lambda request: {place: -place for place in range(len(request.responses))},
        lambda request: set(range(len(request.responses))),
        lambda request: "1" * len(request.responses),
        lambda request: ["x"] * len(request.responses),
        lambda request: [float("nan")] * len(request.responses),
    ],
)
def test_a_failing_function_makes_the_group_invalid(function, caplog):
    oracle = CallableOracle(function=function)
    with caplog.at_level(logging.ERROR):
        rankings = oracle.rank([request(), request()])
    assert not any(ranking.valid for ranking in rankings)
    assert all("the oracle function failed" in ranking.error for ranking in rankings)
    assert len(caplog.records) == 1


def test_what_the_blind_control_asks_hides_no_later_failure(caplog):
    def looks(request):
        return [len(text) / len(request.clips[0].frames) for text in request.responses]

    oracle, picture = CallableOracle(function=looks), Clip(torch.zeros(0, 1, 1, 3), (), "none")
    blind, seeing = request(), request(clips=(picture,))
    oracle.rank([blind, blind, seeing, seeing])
    assert ["without clips" in record.message for record in caplog.records] == [True, False]


async def asks_elsewhere(request):
    return [0.0 for _ in request.responses]


class AsksElsewhere:
    async def __call__(self, request):
        return await asks_elsewhere(request)


LATER = [asks_elsewhere, AsksElsewhere(), partial(asks_elsewhere), partial(AsksElsewhere())]


@pytest.mark.parametrize("function", ["nothing", "no.module:f", "os.path:nothing", "os.path:sep", 3, *LATER])
def test_what_is_no_function_is_refused(function):
    with pytest.raises(UsageError, match="function"):
        CallableOracle(function=function)


def test_replay_matches_by_content_whatever_the_order(tmp_path):
    path = write(
        tmp_path / "v.jsonl",
        {
            "id": "row",
            "question": "?",
            "responses": ["x", "y", "z"],
            "ranks": [2, 0, None],
            "confidence": 0.5,
        },
        {"id": "two", "question": "?", "responses": ["p", "q"], "ranks": [1, 0]},
        {"example_id": "three", "question": "?", "responses": ["p", "q"], "oracle_ranks": [0, 1]},
    )
    oracle = ReplayOracle(path=path)
    rankings = oracle.rank(
        [
            request(("z", "x", "y", "y")),
            request(("p", "q"), name="7:two"),
            request(("p", "q"), name="8:three"),
            request(("p", "q"), name="8:other"),
            request(("p", "r")),
            request(("x", "y", "z"), question="??"),
        ]
    )
    assert rankings[0] == Ranking((None, 1, 0, 0), 0.5)
    assert rankings[1].ranks == (1, 0)
    assert rankings[2].ranks == (0, 1)
    assert "contradicts" in rankings[3].error
    assert "no verdict" in rankings[4].error
    assert not rankings[5].valid


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"v.jsonl:1: not JSON"),
        ("[1]", "one JSON object"),
        ('{"responses": ["a"], "ranks": [0]}', "at least two"),
        ('{"responses": ["a", "b"], "ranks": [0]}', "1 ranks for 2"),
        ('{"responses": ["a", "b"], "ranks": [0, "1"]}', "'ranks' must be"),
        ('{"responses": ["a", "b"]}', "'ranks' must be"),
        *(
            (
                f'{{"responses": ["a", "b"], "ranks": [0, 1], "confidence": {value}}}',
                r"v.jsonl:1: 'confidence' must be",
            )
            for value in ("-3", "7", "null", '"x"', "true")
        ),
        ('{"responses": ["a", "b"], "ranks": [0, 1]}', "v.jsonl:1: 'question' must be a text"),
        ('{"question": 3, "responses": ["a", "b"], "ranks": [0, 1]}', "v.jsonl:1: 'question' must be a text"),
        (
            f'{{"question": "q", "responses": ["a", "b"], "ranks": [0, {10**400}]}}',
            r"v.jsonl:1: 'ranks' holds an integer beyond 2\*\*53",
        ),
        ("", "v.jsonl holds no rows"),
        ('{"responses": ["a", "b"], "ranks": [0, 1], "confidence": NaN}', "v.jsonl:1: NaN is no JSON"),
        (
            '{"responses": ["a", "b"], "ranks": [0, 1], "ranks": [1, 0]}',
            "v.jsonl:1: the key 'ranks' stands twice",
        ),
        ('{"responses": ["a", "\\ud800"], "ranks": [0, 1]}', "v.jsonl:1: .* half of a character"),
        ("[" * 100_000, "v.jsonl:1: nested more than"),
    ],
)
def test_a_wrong_verdict_file_is_reported_with_its_line(tmp_path, line, message):
    (tmp_path / "v.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=message):
        ReplayOracle(path=tmp_path / "v.jsonl")
    with pytest.raises(UsageError, match="cannot read"):
        ReplayOracle(path=tmp_path / "none.jsonl")


def test_replay_counts_the_confidence_and_takes_no_row_that_contradicts_itself(tmp_path):
    row = {"question": "?", "responses": ["p", "q", "q"], "ranks": [1, 0, 0]}
    oracles = [
        ReplayOracle(path=write(tmp_path / "v.jsonl", {**row, **more}))
        for more in ({"confidence": 0.5}, {"confidence": 0.6}, {"ranks": [1, 0, 2]})
    ]
    assert len({oracle.identity for oracle in oracles}) == 3
    rankings = [oracle.rank([request(("p", "q"))])[0] for oracle in oracles]
    assert [ranking.confidence for ranking in rankings] == [0.5, 0.6, 0.0]
    assert "contradicts itself" in rankings[2].error


def test_an_ensemble_fuses_and_measures_agreement():
    shorter = {"name": "callable", "function": lambda r: [-len(t) for t in r.responses]}
    longer = {"name": "callable", "function": lambda r: [len(t) for t in r.responses]}
    group = request(("a", "bbb", "cc"))
    [agreed] = build_oracle("ensemble", members=[longer, longer, shorter]).rank([group])
    assert agreed.ranks == (2, 0, 1)
    assert agreed.confidence == 0.0  # W = 1/9, what chance gives
    [sure] = build_oracle("ensemble", members=[longer, longer], fusion="kemeny").rank([group])
    assert (sure.ranks, sure.confidence) == ((2, 0, 1), 1.0)
    [split] = build_oracle("ensemble", members=[longer, shorter]).rank([group])
    assert (split.ranks, split.confidence) == ((0, 0, 0), 0.0)
    broken = {"name": "callable", "function": lambda r: 1 / 0}
    [lost] = build_oracle("ensemble", members=[longer, broken]).rank([group])
    assert "1 of 2 members" in lost.error
    [kept] = build_oracle("ensemble", members=[longer, broken], min_members=1).rank([group])
    assert kept.ranks == (2, 0, 1)
    for options in (
        {"members": [longer]},
        {"members": "reference"},
        {"members": [longer] * 2, "fusion": "mean"},
    ):
        with pytest.raises(UsageError):
            build_oracle("ensemble", **options)
    with pytest.raises(UsageError):
        EnsembleOracle([CallableOracle(function=by_length)] * 2, min_members=3)


def test_the_columns_of_a_row_are_its_metadata_as_in_training(tmp_path):
    row = {"id": "1", "question": "?", "answer": "a", "kind": "x", "level": 3, "metadata": {"level": 4}}
    file = write(tmp_path / "rows.jsonl", row)
    [example] = read_examples(file)
    judged = {"responses": ["a", "b"], "ranks": [0, 1], "scores": [1, 0], "confidence": 1.0, "error": None}
    request = row_request(row | judged, "here")
    assert request.metadata == example.metadata == {"kind": "x", "level": 4}
