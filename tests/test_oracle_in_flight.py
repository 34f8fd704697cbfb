"""What is asked twice at the same time is answered once: by threads, in one batch, with and without a cache."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from api_judge import Judge, oracle, request

from rlaif_fast.oracle import Ranking, RankRequest
from rlaif_fast.oracle.cache import CachedOracle
from rlaif_fast.oracle.in_flight import InFlight

THREADS = 4


class Slow:
    """Answers, or fails, when all threads have asked or are waiting."""

    name = "slow"

    def __init__(self, error=None):
        self.error, self.asked, self.go = error, [], threading.Event()

    def rank(self, requests):
        self.asked += [request.question for request in requests]
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        return [Ranking((0, 1), tokens=7) for _ in requests]


def ask_together(judge, groups, before_release=lambda: None):
    """Futures of `judge.rank` of each group of requests, in a thread each."""
    with ThreadPoolExecutor(len(groups)) as threads:
        futures = [threads.submit(judge.rank, group) for group in groups]
        before_release()
    return futures


def group(question="?", name="1"):
    return RankRequest(name, question, ("a", "b"))


@pytest.mark.parametrize("cached", [False, True])
def test_threads_pay_once_for_one_question(tmp_path, cached):
    with Judge(delay=0.3) as server:
        judge = oracle(server, orders=2, timeout=30.0)
        judge = CachedOracle(judge, path=tmp_path / "c") if cached else judge
        groups = [[replace(request(), id=str(thread))] for thread in range(THREADS)]
        rankings = [future.result(60)[0] for future in ask_together(judge, groups)]
    assert len(server.bodies) == 2  # one a showing
    assert all(ranking.valid and ranking == rankings[0] for ranking in rankings)


def test_equal_groups_of_a_batch_are_judged_once():
    with Judge() as server:
        judge = oracle(server, orders=2)
        first, other, second = judge.rank(
            [request(), replace(request(), question="where?"), replace(request(), id="2")]
        )
    assert len(server.bodies) == 4
    assert first == second and first.valid and other.valid


def test_an_answer_that_stands_often_is_graded_once():
    with Judge(fault=lambda body, number: "rejected") as server:
        said = [
            RankRequest(str(i), "who?", ("a man",), reference=man)
            for i, man in enumerate(["man", "man", "boy"])
        ]
        assert oracle(server).grade(said) == [None] * 3
    assert len(server.bodies) == 2


def test_a_question_that_another_thread_asks_is_waited_for_and_kept(tmp_path):
    slow = Slow()
    judge = CachedOracle(slow, path=tmp_path / "c")
    groups = [[group("x"), group("y")], [group("y", "2"), group("z")], [group("z", "3"), group("x", "3")]]

    def release():
        while len(slow.asked) < 3:
            pass
        slow.go.set()

    futures = ask_together(judge, groups, release)
    assert [len(future.result(30)) for future in futures] == [2, 2, 2]
    assert sorted(slow.asked) == ["x", "y", "z"]
    assert judge.stats() == {"oracle/cache_hits": 3.0, "oracle/cache_misses": 3.0}
    assert all(ranking.valid for ranking in CachedOracle(Slow(), path=tmp_path / "c").rank(groups[0]))


@pytest.mark.parametrize("error", [RuntimeError("down"), KeyboardInterrupt()])
def test_who_waits_gets_the_failure_and_the_next_one_asks_anew(tmp_path, error):
    slow = Slow(error)
    judge = CachedOracle(slow, path=tmp_path / "c")
    futures = ask_together(judge, [[group()], [group()]], slow.go.set)
    for future in futures:
        with pytest.raises(type(error)):
            future.result(30)
    slow.error = None
    assert judge.rank([group()])[0].valid


def test_a_copy_has_nothing_in_progress():
    flight = InFlight()

    def work(places):
        for other in (copy.deepcopy(flight), pickle.loads(pickle.dumps(flight))):
            assert other.run(["a"], lambda own: own) == [0]
        return ["done" for _ in places]

    assert flight.run(["a", "b", "a"], work) == ["done"] * 3
