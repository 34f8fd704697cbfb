"""The api oracle with an endpoint that costs money: rate limits, replies of several shapes, keys, what was paid for."""

from __future__ import annotations

import math
import time

import pytest

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from test_oracle_api import Judge, oracle, request


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdef")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


class Limited(Judge):
    """Answers `limit` requests every half second and refuses the others with a Retry-After."""

    def __init__(self, limit):
        super().__init__(fault=self._limit, retry_after="0.5")
        self.limit, self.window, self.passed = limit, None, 0

    def _limit(self, body, number):
        window = math.floor(2 * time.monotonic())
        if window != self.window:
            self.window, self.passed = window, 0
        self.passed += 1
        return None if self.passed <= self.limit else "rate_limit"


def test_a_rate_limit_costs_time_and_no_group():
    with Limited(10) as server:
        judge = oracle(server, max_attempts=3, concurrency=8, max_backoff=1.0)
        rankings = judge.rank([request(f"g{n}") for n in range(12)])
    assert [ranking.error for ranking in rankings] == [None] * 12
    assert all(len(ranking.verdicts) == 4 for ranking in rankings)
    assert all(verdict.error is None for ranking in rankings for verdict in ranking.verdicts)
    stats = judge.stats()
    assert stats["oracle/api/fault_rate_limit"] == stats["oracle/api/retries"] > 0
    # 48 answers; where one request is told to wait, the next `concurrency` at most ask in vain
    assert len(server.bodies) < 48 + 8 * 8


def test_a_rate_limit_that_nobody_passes_is_given_up():
    with Judge(fault=lambda body, number: "rate_limit") as server:
        (ranking,) = oracle(server, orders=2, max_attempts=3).rank([request()])
    assert "HTTP 429" in ranking.error
    assert len(server.bodies) == 6


def test_a_long_retry_after_of_one_request_does_not_stop_the_others():
    def fault(body, number):
        return "rate_limit" if "g0" in body["messages"][1]["content"][-1]["text"] else None

    with Judge(fault, retry_after="3600") as server:
        judge = oracle(server, concurrency=2, deadline=5.0)
        late, *others = judge.rank([request(f"g{n}") for n in range(4)])
    assert not late.valid
    assert all(ranking.valid for ranking in others)
