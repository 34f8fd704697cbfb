"""The api oracle with an endpoint that costs money: rate limits, replies of several shapes, keys, what was paid for."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from api_judge import Judge, oracle, request

from rlaif_fast.data.benchmarks.base import Item
from rlaif_fast.data.schema import Example
from rlaif_fast.evals.records import EvalFolder, Record, read_records
from rlaif_fast.evals.runner import GRADED_AT_ONCE, grade_rest
from rlaif_fast.oracle.cache import CachedOracle
from rlaif_fast.oracle.wire import Fault, Response, read_completion
from rlaif_fast.video.base import Clip


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


def test_a_key_that_a_server_echoes_is_removed_before_the_reply_is_cut(monkeypatch):
    secret = "aB3/" * 60  # longer than what is kept of an error, and like no key that is known by its form
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with Judge(fault=lambda body, number: "rejected") as server:
        (ranking,) = oracle(server, orders=1).rank([request()])
    assert server.keys[0] == f"Bearer {secret}"
    assert "no luck with Bearer [key], known is [key]" in ranking.error
    assert secret[:8] not in repr(ranking)


def test_what_a_refusal_cost_is_counted():
    with Judge(fault=lambda body, number: "all thought") as server:
        judge = oracle(server, orders=1, max_attempts=2)
        (ranking,) = judge.rank([request()])
    assert not ranking.valid
    assert ranking.tokens == 2 * 110
    assert judge.stats()["oracle/api/completion_tokens"] == 2 * 10


def test_null_leaves_a_field_out():
    with Judge() as server:
        more = {"max_tokens": None, "temperature": None, "max_completion_tokens": 50, "response_format": None}
        assert oracle(server, orders=1, extra_body=more).rank([request()])[0].valid
    (body,) = server.bodies
    assert set(body) == {"model", "messages", "max_completion_tokens"}


def test_the_reasoning_beside_a_reply_is_not_part_of_it():
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "well"}]},
        {"type": "text", "text": "{}"},
    ]
    body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    assert read_completion(Response(200, {}, body)).content == "{}"


@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "Insufficient credits", "code": 402}}',
        'data: {"choices": []}\n\ndata: [DONE]\n',
    ],
)
def test_a_reply_that_is_no_completion_is_shown(body):
    with pytest.raises(Fault, match=re.escape(" ".join(body.split()))) as caught:
        read_completion(Response(200, {}, body.encode()))
    assert caught.value.kind == "malformed_body"


class Grading(Judge):
    def _verdict(self, body, fault):
        return json.dumps({"pred": "yes", "score": 5})


def asked_about(count, folder):
    examples = [Example(id=f"e{n}", question=f"what is {n}?", answer=str(n)) for n in range(count)]
    records = {
        e.id: Record(
            e.id, "v", {"category": ""}, e.question, e.answer, prediction=f"it is {e.answer}", correct=False
        )
        for e in examples
    }
    return [Item(example) for example in examples], EvalFolder(folder, records)


def test_each_part_of_the_missing_grades_has_a_deadline_of_its_own_and_is_kept(tmp_path):
    items, folder = asked_about(4 * GRADED_AT_ONCE + 8, tmp_path)

    def stops(body, number):
        if number > GRADED_AT_ONCE:
            raise ConnectionError
        time.sleep(0.01)

    with Grading(stops) as server:
        judge = oracle(server, deadline=20.0, max_attempts=1)
        assert grade_rest(items, folder, judge) == 3 * GRADED_AT_ONCE + 8
        # The second part got none, and the others were not asked.
        assert judge.stats()["oracle/api/requests"] == 2 * GRADED_AT_ONCE
    kept = read_records(folder.items)
    assert sum(record.pred is True for record in kept) == GRADED_AT_ONCE
    with Grading(delay=0.05) as server:  # all together take longer than the deadline
        assert grade_rest(items, folder, oracle(server, deadline=3.0, concurrency=3)) == 0
    assert all(record.pred and record.score == 5 for record in read_records(folder.items))


def run_in_notebook(call):
    """Call from inside a running event loop that leaves SIGINT alone."""

    async def cell():
        call()

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(cell())
    finally:
        loop.close()


@pytest.fixture
def interruptible():
    """Ctrl-C raises, as at a terminal: a process that was started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("run", [lambda call: call(), run_in_notebook], ids=["script", "notebook"])
def test_what_an_interrupted_judge_gave_is_kept(tmp_path, run):
    """The third group hangs, and the user ends the run."""
    groups = [request(f"g{n}") for n in range(3)]

    def hangs(body, number):
        return "timeout" if "g2" in body["messages"][1]["content"][-1]["text"] else None

    def interrupt(server):
        while server.counts[None] < 8:
            time.sleep(0.02)
        time.sleep(0.5)  # until the last reply is read
        os.kill(os.getpid(), signal.SIGINT)

    with Judge(hangs) as server:
        judge = CachedOracle(oracle(server, timeout=60.0), path=tmp_path / "verdicts")
        threading.Thread(target=interrupt, args=[server]).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(lambda: judge.rank(groups))
        assert time.monotonic() - start < 30.0
    with Judge() as server:
        again = CachedOracle(oracle(server), path=tmp_path / "verdicts")
        assert all(ranking.ranks == (0, 1, 2, 3, 4) for ranking in again.rank(groups))
    assert again.hits == 2
    assert len(server.bodies) == 4


def test_a_verdict_is_kept_by_what_the_judge_was_shown(tmp_path):
    """Another column of the dataset, or frames of which the judge sees none, are no reason to pay again."""
    clip = Clip(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), (0.0,), "clip")

    def asked(before, now, **options):
        with Judge() as server:
            judge = CachedOracle(oracle(server, orders=1, **options), path=tmp_path / "verdicts")
            judge.rank([before])
            return judge.rank([now]) and len(server.bodies)

    plain = request("a", reference="a red square")
    assert asked(plain, replace(plain, category="new", metadata={"source": "web"})) == 1
    assert asked(request("b"), request("b", clips=(clip,)), use_clips=False) == 1
    assert asked(request("c"), request("c", reference="x"), use_reference=False) == 1
    assert asked(request("d"), request("d", clips=(clip,))) == 2
    assert asked(request("e"), request("e", reference="x")) == 2
    assert asked(request("f"), request("f", options=("x", "y"))) == 2
