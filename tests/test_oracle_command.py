"""`python -m rlaif_fast.oracle`: rank, agree and pairs, over files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
from oracle_file_parts import write

from rlaif_fast.oracle.__main__ import main
from rlaif_fast.oracle.records import row_request

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


def test_a_null_is_a_key_that_is_not_there(tmp_path, capsys):
    row = {"id": None, "example_id": "e", "question": "?", "category": None, "responses": ["a", "b"]}
    request = row_request(row, "v.jsonl:1")
    assert (request.id, request.category) == ("e", "")
    source = str(write(tmp_path / "v.jsonl", {**row, "ranks": [0, 1]}))
    assert main(["agree", source, source]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["all", "1", "1.000", "1.000"]


def test_agree_shows_disagreement_and_what_is_missing(tmp_path, capsys):
    base = {"responses": ["a", "b", "c"], "category": "c"}
    first = write(
        tmp_path / "a.jsonl", {**base, "id": 1, "ranks": [0, 1, 2]}, {**base, "id": 2, "ranks": [0, 1, 2]}
    )
    second = write(tmp_path / "b.jsonl", {**base, "id": 1, "ranks": [2, 1, 0]})
    assert main(["agree", str(first), str(second)]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["c", "1", "-1.000", "0.000"],
        ["all", "1", "-1.000", "0.000"],
    ]
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


@pytest.mark.parametrize("within", [False, True])
def test_rankings_that_an_oracle_reads_are_not_written_over(tmp_path, capsys, within):
    source = write(tmp_path / "in.jsonl", ROWS[0])
    ranked = tmp_path / "in.ranked.jsonl"
    assert main(["rank", str(source)]) == 0
    before = ranked.read_bytes()
    given = ["--oracle", "replay", "--option", f"path={ranked}"]
    if within:
        members = json.dumps([{"oracle": "replay", "path": str(ranked)}])
        given = ["--oracle", "ensemble", "--option", f"oracles={members}"]
    assert main(["rank", str(source), *given]) == 2
    assert f"output: {ranked} is read, and would be lost" in capsys.readouterr().err
    assert ranked.read_bytes() == before


@pytest.mark.parametrize("flag", ["--nframes=4", "--media_root=."])
def test_what_only_a_decoded_video_needs_is_refused_without_one(tmp_path, capsys, flag):
    source = write(tmp_path / "in.jsonl", ROWS[0])
    assert main(["rank", str(source), "--no_clips", flag]) == 2
    assert f"{flag.partition('=')[0]}: not read with --no_clips" in capsys.readouterr().err


def test_what_no_row_reads_is_told(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ROWS[0])
    assert main(["rank", str(source), "--nframes", "4", "--media_root", str(tmp_path / "none")]) == 0
    told = capsys.readouterr().err
    assert "media_root: not read, since no path is relative\n" in told
    assert "nframes: not read, since no row has a video\n" in told


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rlaif_fast.oracle", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert {"api", "reference", "replay"} <= set(done.stdout.split())


@pytest.mark.parametrize("none", [{}, {"category": "all"}])
def test_agree_calls_one_row_all(tmp_path, capsys, none):
    """Groups of a run without a category are of "all", which was also the total's name."""
    rows = [
        {"id": 1, "responses": ["a", "b"], "ranks": [0, 1], **none},
        {"id": 2, "responses": ["a", "b"], "ranks": [0, 1], "category": "c"},
    ]
    source = str(write(tmp_path / "v.jsonl", *rows))
    assert main(["agree", source, source]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["(none)", "c", "all"]


def test_a_pipe_is_refused_with_a_reason(tmp_path, capsys):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that opening it to read does not wait
    try:
        os.write(writer, b'{"question": "?", "responses": ["a", "b"]}\n' + b" " * 8192 + b"\n")
        assert main(["rank", str(pipe), "--output", str(tmp_path / "ranked.jsonl")]) == 2
    finally:
        os.close(writer)
    assert "cannot read the dataset: File or stream is not seekable" in capsys.readouterr().err
