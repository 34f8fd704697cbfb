"""Functions and files as oracles, and the command line around them."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys

import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import Ranking, RankRequest, build_oracle
from rlaif_fast.oracle.__main__ import main
from rlaif_fast.oracle.callable import CallableOracle
from rlaif_fast.oracle.ensemble import EnsembleOracle
from rlaif_fast.oracle.replay import ReplayOracle


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


async def asks_elsewhere(request):
    return [0.0 for _ in request.responses]


@pytest.mark.parametrize(
    "function", ["nothing", "no.module:f", "os.path:nothing", "os.path:sep", 3, asks_elsewhere]
)
def test_what_is_no_function_is_refused(function):
    with pytest.raises(UsageError, match="function"):
        CallableOracle(function=function)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


ROWS = (
    {
        "id": "1",
        "question": "?",
        "answer": "a red square",
        "responses": ["a red square", "red", "x"],
        "category": "c1",
    },
    {"id": "2", "question": "?", "answer": "3", "responses": ["4", "3", "three"], "category": "c2"},
    {"id": "3", "question": "?", "responses": ["a", "b"], "category": "c2"},
)


def test_rank_then_agree(tmp_path, capsys):
    source, ranked = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "in.ranked.jsonl"
    assert main(["rank", str(source), "--cache", str(tmp_path / "cache")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(ranked)
    assert "oracle/invalid" in err
    assert "1 of 3 groups could not be ranked; the last: request '3' has no reference answer" in err
    rows = [json.loads(line) for line in ranked.read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [[0, 1, 2], [1, 0, 0], [None, None]]
    assert "no reference answer" in rows[2]["error"]
    assert {row["category"] for row in rows} == {"c1", "c2"}

    other = tmp_path / "other.jsonl"
    noisy = [
        "--oracle",
        "corrupted",
        "--option",
        "inner=reference",
        "--option",
        "kind=flips",
        "--option",
        "strength=1.0",
        "--output",
        str(other),
    ]
    assert main(["rank", str(source), *noisy]) == 0
    assert (
        main(
            ["rank", str(source), "--oracle", "replay", "--option", f"path={ranked}", "--output", str(other)]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["agree", str(ranked), str(other)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table == [
        ["category", "groups", "tau", "top-1"],
        ["c1", "1", "1.000", "1.000"],
        ["c2", "2", "1.000", "1.000"],
        ["all", "3", "1.000", "1.000"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_pairs_of_a_ranked_file(tmp_path, capsys):
    source = write(
        tmp_path / "v.jsonl",
        {"id": "a", "question": "?", "responses": ["x", "y", "z"], "ranks": [1, 0, None], "verdicts": [7]},
        {"id": "b", "question": "?", "responses": ["x", "y", "y", "z"], "ranks": [1, 0, 2, 0]},
        {"example_id": "c", "question": "?", "responses": ["p", "q"], "oracle_ranks": [0, 0], "step": 3},
    )
    assert main(["pairs", str(source)]) == 0
    out = capsys.readouterr()
    assert out.out == f"{tmp_path / 'v.pairs.jsonl'}\n"
    assert "1 pairs of 3 groups; 2 groups have none" in out.err  # the best and worst of b are one text
    rows = [json.loads(line) for line in (tmp_path / "v.pairs.jsonl").read_text().splitlines()]
    assert rows == [
        {"id": "a", "question": "?", "chosen": "y", "rejected": "x", "ranks": [0, 1], "source": f"{source}:1"}
    ]
    assert main(["pairs", str(source), "--pairs", "all", "--output", str(tmp_path / "all.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [(row["id"], row["chosen"], row["rejected"], *row["ranks"]) for row in rows] == [
        ("a", "y", "x", 0, 1),
        ("b", "x", "y", 1, 2),
        ("b", "y", "x", 0, 1),
        ("b", "z", "x", 0, 1),
        ("b", "z", "y", 0, 2),
    ]


def test_pairs_refuse_a_file_without_any(tmp_path, capsys):
    tied = write(tmp_path / "v.jsonl", {"question": "?", "responses": ["x", "y"], "ranks": [0, 0]})
    assert main(["pairs", str(tied)]) == 2
    assert "none of its 1 groups has two responses of different rank" in capsys.readouterr().err
    assert main(["pairs", str(tied), "--output", str(tied)]) == 2
    assert "is read, and would be lost" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["v.jsonl"]


def test_agree_shows_disagreement_and_what_is_missing(tmp_path, capsys):
    base = {"responses": ["a", "b", "c"], "category": "c"}
    first = write(
        tmp_path / "a.jsonl", {**base, "id": 1, "ranks": [0, 1, 2]}, {**base, "id": 2, "ranks": [0, 1, 2]}
    )
    second = write(tmp_path / "b.jsonl", {**base, "id": 1, "ranks": [2, 1, 0]})
    assert main(["agree", str(first), str(second)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ["c", "1", "-1.000", "0.000"]
    assert "1 groups are in the first file alone" in err
    third = write(tmp_path / "c.jsonl", {**base, "id": 9, "ranks": [0, 1, 2]})
    assert main(["agree", str(first), str(third)]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({}, {"responses": ["b", "a"]}), "v.jsonl:2: ranks the group '1' otherwise than"),
        (({"responses": ["a", "a"]},), "v.jsonl:1: gives the response 'a' two ranks"),
    ],
)
def test_agree_refuses_a_group_that_is_ranked_in_two_ways(tmp_path, capsys, rows, message):
    base = {"id": 1, "responses": ["a", "b"], "ranks": [0, 1]}
    path = write(tmp_path / "v.jsonl", *({**base, **row} for row in rows))
    assert main(["agree", str(path), str(path)]) == 2
    assert message in capsys.readouterr().err
    same = write(tmp_path / "w.jsonl", base, {**base, "responses": ["b", "a"], "ranks": [1, 0]})
    assert main(["agree", str(same), str(same)]) == 0


@pytest.mark.parametrize(
    ("row", "arguments", "code", "message"),
    [
        ({"question": "?"}, [], 2, "in.jsonl:1: 'responses'"),
        ({"responses": ["a", "b"]}, [], 2, "'question'"),
        (ROWS[0], ["--oracle", "refrence"], 2, "did you mean 'reference'"),
        (ROWS[0], ["--option", "x"], 2, "KEY=VALUE"),
        (ROWS[0], ["--option", "tolerence=1"], 2, "did you mean 'tolerance'"),
        (ROWS[0], ["--option", "tolerance=.1", "--option", "tolerance=.5"], 2, "tolerance: expected it once"),
        (ROWS[0], ["--option", "tolerance=abc"], 2, "'tolerance': expected a number, got 'abc'"),
        (ROWS[0], ["--option", "cache=x"], 2, "--option cache: give it as --cache"),
        (ROWS[0], ["--option", "max_invalid_fraction=1"], 2, "give it as --max_invalid_fraction"),
        (ROWS[0], ["--option", "name=api"], 2, "--option name: give it as --oracle"),
        (ROWS[0], ["--option", "window=abc"], 2, "window: expected a whole number of at least 1, got 'abc'"),
        ({**ROWS[0], "video": "none.mp4"}, [], 2, "none.mp4"),
        (ROWS[0], ["--batch_size", "0"], 2, "batch_size: expected 1 or more, got 0"),
        (ROWS[0], ["--output", "/nonexistent/x"], 2, "does not exist"),
        ({"question": "?", "responses": ["a", "b"]}, ["--max_invalid_fraction", "0"], 1, "could not rank"),
    ],
)
def test_errors_are_one_line_with_a_code(tmp_path, capsys, row, arguments, code, message):
    source = write(tmp_path / "in.jsonl", *[row] * 32)
    assert main(["rank", str(source), *arguments]) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    assert err[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def down_after_the_first(request):
    if request.question != "first":
        raise OSError("the judge is down")
    return list(range(len(request.responses)))


def test_what_was_ranked_before_the_judge_went_down_is_kept(tmp_path, capsys):
    row = {"responses": ["a", "b"]}
    rows = [{**row, "id": str(n), "question": "first" if n < 64 else "later"} for n in range(192)]
    source = write(tmp_path / "in.jsonl", *rows)
    arguments = ["--oracle", "callable", "--option", f"function={__name__}:down_after_the_first"]
    assert main(["rank", str(source), *arguments]) == 1
    assert not (tmp_path / "in.ranked.jsonl").exists()
    (part,) = tmp_path.glob("in.ranked.part-*.jsonl")
    kept = [json.loads(line) for line in part.read_text().splitlines()]
    assert [row["id"] for row in kept] == [str(n) for n in range(64)]
    assert all(row["ranks"] == [1, 0] for row in kept)
    *_, told, error = capsys.readouterr().err.strip().splitlines()
    assert str(part) in told and error.startswith("error: ") and "the judge is down" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", part.name]


def silent(request):
    return [None for _ in request.responses]


@pytest.mark.parametrize(("arguments", "code"), [([], 1), (["--max_invalid_fraction", "1"], 0)])
def test_a_short_file_of_which_nothing_was_ranked_is_a_failure(tmp_path, capsys, arguments, code):
    source = write(tmp_path / "in.jsonl", ROWS[0])
    silence = ["--oracle", "callable", "--option", f"function={__name__}:silent"]
    assert main(["rank", str(source), *silence, *arguments]) == code
    out, err = capsys.readouterr()
    assert "1 of 1 groups could not be ranked; the last: fewer than two responses could be judged" in err
    assert json.loads((tmp_path / "in.ranked.jsonl").read_text())["ranks"] == [None] * 3
    assert out.strip() == str(tmp_path / "in.ranked.jsonl")


def endless(request):
    return [math.inf, *range(1, len(request.responses))]


def test_what_rank_writes_is_json_that_others_may_read(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS[0])
    source.chmod(0o644)
    arguments = ["--oracle", "callable", "--option", f"function={__name__}:endless"]
    mask = os.umask(0o022)
    try:
        assert main(["rank", str(source), *arguments]) == 0
    finally:
        os.umask(mask)
    ranked = tmp_path / "in.ranked.jsonl"
    row = json.loads(ranked.read_text(), parse_constant=pytest.fail)
    assert (row["ranks"], row["scores"]) == ([0, 2, 1], [None, 1.0, 2.0])
    assert ranked.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("output", [[], ["--output", "out"]])
def test_a_cache_and_what_rank_writes_are_two_files(tmp_path, capsys, output, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", ROWS[0])
    cache = output[-1] if output else "in.ranked.jsonl"
    assert main(["rank", "in.jsonl", "--cache", cache, *output]) == 2
    assert f"cache: {cache} is the file to write" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rlaif_fast.oracle", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert {"api", "reference", "replay"} <= set(done.stdout.split())
