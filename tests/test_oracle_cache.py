"""The verdict cache: nothing is asked twice, many may write, damage is set aside and said."""

from __future__ import annotations

import logging
import multiprocessing
import random
import sqlite3

import numpy as np
import pytest
import torch

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.oracle import Ranking, RankRequest, ReferenceOracle, build_oracle
from rlaif_fast.oracle.base import gives_scores
from rlaif_fast.oracle.cache import CachedOracle, VerdictCache
from rlaif_fast.oracle.judge import Verdict
from rlaif_fast.oracle.records import ranking_from_json, ranking_to_json
from rlaif_fast.video.base import Clip


class Counting:
    name = "counting"

    def __init__(self, identity="counting/1", fail=lambda request: False):
        self.identity = identity
        self.fail = fail
        self.asked = []

    def rank(self, requests):
        self.asked += [request.id for request in requests]
        return [
            Ranking((None,) * len(r.responses), 0.0, error="down")
            if self.fail(r)
            else Ranking(
                tuple(range(len(r.responses))),
                0.5,
                (Verdict((1, 0), (0, 1), ("raw",)), 0.25),
                tokens=7,
                seconds=0.5,
            )
            for r in requests
        ]


def request(name, question="?", **kwargs):
    return RankRequest(name, question, ("a", "b"), **kwargs)


def test_a_verdict_is_asked_once_and_comes_back_whole(tmp_path):
    path = tmp_path / "deep" / "verdicts.sqlite"
    inner = Counting()
    first = CachedOracle(inner, path=path).rank([request("1"), request("2", "other"), request("3")])
    assert inner.asked == ["1", "2"]  # 1 and 3 ask the same
    again = Counting()
    oracle = CachedOracle(again, path=path)
    assert oracle.rank([request("9"), request("8", "other")]) == first[:2]
    assert again.asked == []
    assert oracle.stats() == {"oracle/cache_hits": 2.0, "oracle/cache_misses": 0.0}
    assert first[0] == first[2] == inner.rank([request("1")])[0]


def test_the_key_is_the_content_and_the_judge(tmp_path):
    clip = Clip(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), (0.0,), key="clip")
    requests = [
        request("0"),
        request("0", clips=(clip,)),
        request("0", reference="a"),
        request("0", options=("a", "b")),
        request("0", metadata={"form": "a"}),
        RankRequest("0", "?", ("b", "a")),
        RankRequest("0", "?", ("a", "b", "")),
    ]
    inner = Counting()
    CachedOracle(inner, path=tmp_path / "c").rank(requests)
    assert len(inner.asked) == len(requests)
    other = Counting("counting/2")
    CachedOracle(other, path=tmp_path / "c").rank(requests[:1])
    assert other.asked == ["0"]
    base = ReferenceOracle()
    assert CachedOracle(base, path=tmp_path / "c").key(requests[0]) != CachedOracle(
        ReferenceOracle(tolerance=0.1), path=tmp_path / "c"
    ).key(requests[0])


def test_pictures_and_arrays_are_told_apart_by_their_content(tmp_path):
    """Trainers decode a picture anew for every row: another object that holds the same asks the same."""
    image = pytest.importorskip("PIL.Image")

    def told(red, last):
        picture, array = image.new("RGB", (8, 8), (red, 0, 0)), np.zeros(5000)
        array[2500] = last
        return {"picture": picture, "array": array, "tensor": torch.full((3,), last), "facts": {1: 2, "a": 3}}

    inner = Counting()
    oracle = CachedOracle(inner, path=tmp_path / "c")
    for name in ("1", "2"):
        oracle.rank([request(name, metadata=told(1, 0.0))])
        oracle.rank([request(name, metadata={key: told(1, 0.0)[key] for key in ("picture", "array")})])
    assert inner.asked == ["1", "1"]
    for more in (told(2, 0.0), told(1, 1.0)):
        for key in ("picture", "array"):
            oracle.rank([request("3", metadata={key: more[key]})])
    assert inner.asked == ["1", "1", "3", "3", "3", "3"]


def test_numbers_of_other_libraries_are_kept(tmp_path):
    """What was paid for is not lost because it is spelled in NumPy's or torch's numbers."""

    class Foreign(Counting):
        gives_scores = True

        def rank(self, requests):
            super().rank(requests)
            scores = (np.float32(0.5), torch.tensor(0.25))
            told = (np.float64(0.5), np.arange(2))
            return [
                Ranking(np.array([1, 0]), np.float32(0.5), told, np.int64(7), np.float32(2), scores=scores)
                for _ in requests
            ]

    inner = Foreign()
    for _ in range(2):
        [ranking] = CachedOracle(inner, path=tmp_path / "c").rank([request("1")])
        assert ranking.ranks == (1, 0)
        assert ranking.scores == (0.5, 0.25) and ranking.confidence == 0.5
    assert inner.asked == ["1"]
    assert ranking.verdicts == (0.5, [0, 1])


def test_failures_are_not_kept(tmp_path):
    path = tmp_path / "c"
    CachedOracle(Counting(fail=lambda r: r.id == "1"), path=path).rank([request("1"), request("2", "x")])
    inner = Counting()
    assert all(
        ranking.valid for ranking in CachedOracle(inner, path=path).rank([request("1"), request("2", "x")])
    )
    assert inner.asked == ["1"]


def _write(path, start, barrier):
    barrier.wait(30)
    oracle = CachedOracle(Counting(), path=path)
    for n in range(start, start + 60):
        oracle.rank([request(str(n), f"question {n}")])


def test_processes_write_at_once(tmp_path):
    path = tmp_path / "c"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_write, args=(path, start, barrier)) for start in (0, 30, 60, 90)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(VerdictCache(path)) == 150


def _damage_header(path):
    path.write_bytes(b"not a database at all" * 100)


def _damage_pages(path):
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(b"\xa5" * (len(content) - 4096))
    path.write_bytes(bytes(content))


def _damage_row(path):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE verdicts SET ranking = '{\"ranks\": 3}'")


def _no_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE verdicts RENAME COLUMN ranking TO other")


def _other_layout(path):
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=77")


@pytest.mark.parametrize("damage", [_damage_header, _damage_pages, _no_table, _other_layout])
def test_a_damaged_cache_is_set_aside_and_said(tmp_path, caplog, damage):
    path = tmp_path / "c.sqlite"
    oracle = CachedOracle(Counting(), path=path)
    oracle.rank([request(str(n), f"question {n}") for n in range(50)])
    oracle.cache.close()
    damage(path)
    inner = Counting()
    with caplog.at_level(logging.WARNING):
        assert CachedOracle(inner, path=path).rank([request("0", "question 0")])[0].valid
    assert inner.asked == ["0"]
    aside = [
        file
        for file in tmp_path.iterdir()
        if ".corrupt-" in file.name and not file.name.endswith(("wal", "shm"))
    ]
    assert len(aside) == 1
    assert aside[0].name in caplog.text
    assert CachedOracle(Counting(), path=path).rank([request("0", "question 0")])[0].tokens == 7


def test_damage_while_open_is_survived(tmp_path, caplog):
    path = tmp_path / "c.sqlite"
    oracle = CachedOracle(Counting(), path=path)
    oracle.rank([request(str(n), f"question {n}") for n in range(50)])
    _damage_row(path)
    with caplog.at_level(logging.WARNING):
        assert oracle.rank([request("0", "question 0")])[0].valid
    assert "1 damaged rows are dropped" in caplog.text
    assert len(oracle.cache) == 50


@pytest.mark.parametrize(
    "change",
    [
        "ranking = '{\"ranks\": 3}'",
        "ranking = replace(ranking, '[0, 1]', '[1, 0]')",
        "ranking = x'ff'",
        "ranking = ''",
        "checksum = ''",
        "checksum = upper(checksum)",
        "ranking = (SELECT ranking FROM verdicts ORDER BY key DESC LIMIT 1) || ' '",
    ],
)
def test_a_changed_row_is_dropped_and_asked_about_anew(tmp_path, caplog, change):
    path = tmp_path / "c.sqlite"
    oracle = CachedOracle(Counting(), path=path)
    [true] = oracle.rank([request("0")])
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE verdicts SET {change}")
    with caplog.at_level(logging.WARNING):
        assert oracle.rank([request("0")]) == [true]
    assert "dropped" in caplog.text
    assert oracle.inner.asked == ["0", "0"]
    assert oracle.rank([request("0")]) == [true]
    assert oracle.inner.asked == ["0", "0"]


@pytest.mark.parametrize("open_meanwhile", [False, True])
def test_no_single_flip_gives_a_wrong_verdict_or_an_error(tmp_path, open_meanwhile):
    class Telling(Counting):
        """Ranks by the request's id, so that a verdict on another group shows."""

        def rank(self, requests):
            self.asked += [request.id for request in requests]
            return [Ranking((int(r.id) % 2, 1 - int(r.id) % 2), tokens=int(r.id)) for r in requests]

    groups = [request(str(n), f"question {n}") for n in range(40)]
    whole = tmp_path / "whole.sqlite"
    made = CachedOracle(Telling(), path=whole)
    right = made.rank(groups)
    made.cache.close()
    content = whole.read_bytes()
    generator = random.Random(0)
    survived = 0
    for number in range(120):
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(content)
        opened = CachedOracle(Telling(), path=path) if open_meanwhile else None
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        oracle = opened or CachedOracle(Telling(), path=path)
        assert oracle.rank(groups) == right
        assert oracle.rank(groups) == right
        oracle.cache.close()
        survived += len(oracle.inner.asked) < len(groups)
    assert survived > 60  # most flips cost nothing but their row


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(UsageError, match="folder"):
        VerdictCache(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot make"):
        VerdictCache(tmp_path / "file" / "c")
    assert issubclass(UsageError, RlaifFastError)


def test_a_file_that_never_was_a_cache_is_left_alone(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "which shape?"}\n')
    with pytest.raises(UsageError, match=r"rows\.jsonl holds something else"):
        VerdictCache(rows)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert rows.read_text() == '{"question": "which shape?"}\n'


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    VerdictCache("~/verdicts.db").put_many([("key", Ranking((0, 1)))])
    assert (tmp_path / "home" / "verdicts.db").is_file() and not (tmp_path / "~").exists()


def test_build_with_a_cache_keeps_scores(tmp_path):
    oracle = build_oracle("reference", cache=tmp_path / "c")
    group = request("1", reference="a")
    assert gives_scores(oracle)
    fresh, kept = (oracle.rank([group])[0] for _ in range(2))
    assert fresh.ranks == kept.ranks == (0, 1)
    assert fresh.scores == kept.scores
    assert kept.scores[0] == 1.0
    assert oracle.stats()["oracle/cache_misses"] == 1.0


def test_rankings_survive_json():
    verdicts = (Verdict((2, 0), (0, None, 1), ("x",), "e"), {"a": 1})
    ranking = Ranking((0, None, 1), 0.5, verdicts, 3, 0.1, None, scores=(0.75, None, -0.1))
    assert ranking_from_json(ranking_to_json(ranking)) == ranking
    for bad in ({}, {"ranks": "01"}, {"ranks": [0.5]}, {"ranks": [True]}):
        with pytest.raises(ValueError, match="ranks"):
            ranking_from_json(bad)
    for scores in ([0.5], [0.5, "1"], [True, 0.5], 0.5):
        with pytest.raises(ValueError, match="scores"):
            ranking_from_json({"ranks": [0, 1], "scores": scores})
