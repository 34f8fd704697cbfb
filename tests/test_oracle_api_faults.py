"""Faults of a real HTTP judge: survived, counted, and bounded by the deadline."""

from __future__ import annotations

import logging
import random
import socket
import time

import pytest

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
from api_judge import RESPONSES, Judge, oracle, quality, request

from rlaif_fast.oracle import OracleFailedError, build_oracle
from rlaif_fast.oracle.fusion import kendall_tau
from rlaif_fast.oracle.wire import retry_after

KEY = "sk-test-0123456789abcdef"


FAULTS = (
    "timeout",
    "rate_limit",
    "server_error",
    "malformed_body",
    "malformed",
    "missing_ids",
    "duplicate_ids",
    "unknown_ids",
    "refusal",
    "connection",
)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_survived_and_counted(fault):
    with Judge(fault=lambda body, number: fault if number == 1 else None) as server:
        judge = oracle(server, timeout=1.0 if fault == "timeout" else 20.0)
        (ranking,) = judge.rank([request()])
    assert ranking.ranks == (0, 1, 2, 3, 4)
    assert judge.stats()[f"oracle/api/fault_{fault}"] == 1
    assert judge.stats()["oracle/api/retries"] == 1
    assert len(server.bodies) == 5


@pytest.mark.parametrize("fault", [*FAULTS, "rejected", "filtered"])
def test_a_lasting_fault_makes_the_group_invalid_and_keeps_the_key_secret(fault, caplog):
    caplog.set_level(logging.DEBUG)
    with Judge(fault=lambda body, number: fault) as server:
        judge = oracle(server, orders=2, max_attempts=2, timeout=0.3 if fault == "timeout" else 20.0)
        (ranking,) = judge.rank([request()])
    if fault == "missing_ids":  # what was judged is ranked, what was not is left out
        assert ranking.ranks == (None, 0, 1, 2, 3)
        assert ranking.valid
    else:
        assert ranking.ranks == (None,) * 5
        assert not ranking.valid
        assert ranking.error
        assert ranking.confidence == 0.0
    assert len(server.bodies) == (2 if fault == "rejected" else 4)
    told = f"{ranking} {judge.stats()} {judge.identity} {vars(judge)} {caplog.text}"
    assert KEY not in told
    assert server.keys[0] == f"Bearer {KEY}"


@pytest.mark.parametrize("fault", ["cut", "all thought", "malformed"])
def test_a_reply_that_was_cut_says_what_to_raise(fault):
    with Judge(fault=lambda body, number: fault) as server:
        (ranking,) = oracle(server, orders=1, max_attempts=1).rank([request()])
    assert ("raise the option 'max_tokens'" in ranking.error) == (fault != "malformed")


def test_a_thousand_groups_with_a_fifth_of_faults():
    generator = random.Random(0)
    groups = [
        request(f"g{n}", [RESPONSES[i] for i in generator.sample(range(5), generator.randint(2, 5))])
        for n in range(1000)
    ]

    def fault(body, number):
        return generator.choice(FAULTS) if generator.random() < 0.2 else None

    with Judge(fault=fault) as server:
        judge = oracle(server, orders=1, concurrency=64, timeout=8.0, deadline=120.0, max_attempts=5)
        start = time.monotonic()
        rankings = judge.rank(groups)
        seconds = time.monotonic() - start
    stats = judge.stats()
    assert seconds < 120.0
    assert len(rankings) == 1000
    assert server.most_in_flight <= 64 + server.counts["timeout"] + server.counts["connection"]

    # Every fault that the server produced is one that the client counted, kind by kind, and no other.
    injected = {kind: count for kind, count in server.counts.items() if kind is not None}
    counted = {key.removeprefix("oracle/api/fault_"): n for key, n in stats.items() if "fault_" in key}
    assert set(injected) == set(FAULTS)
    assert counted == injected
    assert sum(injected.values()) > 150
    # Every request is a first try, or the retry of a fault; every fault is retried or given up.
    assert stats["oracle/api/requests"] == len(server.bodies) == 1000 + stats["oracle/api/retries"]
    assert sum(counted.values()) == stats["oracle/api/retries"] + stats.get("oracle/api/gave_up", 0.0)
    # Nothing is lost, and no fault became a rank: a group is ranked right, or invalid with its reason.
    invalid = [ranking for ranking in rankings if not ranking.valid]
    assert len(invalid) <= stats.get("oracle/api/gave_up", 0.0) <= 10
    assert all(ranking.error for ranking in invalid)
    for group, ranking in zip(groups, rankings):
        if ranking.valid and None not in ranking.ranks:
            truth = [-quality(text) for text in group.responses]
            assert kendall_tau(ranking.ranks, truth) == pytest.approx(1.0)


def test_the_deadline_ends_a_call_and_keeps_what_was_judged():
    def fault(body, number):
        return "timeout" if "g1" in body["messages"][1]["content"][-1]["text"] else None

    with Judge(fault=fault) as server:
        judge = oracle(server, timeout=60.0, deadline=4.0)
        start = time.monotonic()
        good, late = judge.rank([request("g0"), request("g1")])
        assert time.monotonic() - start < 30.0
    assert good.valid
    assert not late.valid
    assert "deadline" in late.error


def test_the_deadline_keeps_what_can_be_used_of_a_reply():
    with Judge(fault=lambda body, number: "missing_ids" if number == 1 else "timeout") as server:
        (ranking,) = oracle(server, orders=1, timeout=60.0, deadline=2.0).rank([request()])
    assert ranking.valid and ranking.ranks == (None, 0, 1, 2, 3)


def test_the_deadline_keeps_the_pairs_that_were_compared():
    def fault(body, number):
        return "timeout" if '"nothing"' in body["messages"][1]["content"][-1]["text"] else None

    with Judge(fault=fault) as server:
        (ranking,) = oracle(server, protocol="pairwise", timeout=60.0, deadline=4.0).rank([request()])
    assert ranking.ranks == (0, 1, 2, 3, None)
    assert ranking.valid


def test_retry_after_is_obeyed():
    with Judge(lambda body, number: "rate_limit" if number == 1 else None, retry_after="0.8") as server:
        assert oracle(server, orders=1, backoff=0.0).rank([request()])[0].valid
    first, second = server.times
    assert second - first >= 0.8
    assert retry_after("7") == 7.0
    assert retry_after(None) == retry_after("soon") == retry_after("-3") == 0.0
    in_an_hour = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
    assert 3590 < retry_after(in_an_hour) <= 3600


def test_nobody_listening_is_an_invalid_group_and_then_a_stop():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        judge = build_oracle("api", model="m", base_url=url, backoff=0.001, orders=2, window=8)
        with pytest.raises(OracleFailedError, match="8 of the last 8") as caught:
            judge.rank([request(str(n)) for n in range(8)])
    assert "connect" in str(caught.value).lower()
