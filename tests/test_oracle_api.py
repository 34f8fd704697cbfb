"""The api oracle over real HTTP: a rule-following judge, and a server that produces every failure."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import random
import socket
import sys
import threading
import time
from collections import Counter

import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.oracle import OracleFailedError, RankRequest, build_oracle
from rlaif_fast.oracle.api import ApiOracle
from rlaif_fast.oracle.fusion import kendall_tau
from rlaif_fast.oracle.wire import retry_after
from rlaif_fast.video.base import Clip

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


def quality(text):
    """How good the rule-following judge finds an answer: the words of the right answer that stand in it."""
    return sum(word in text.split() for word in ("a", "red", "square", "moves", "left"))


class Judge:
    """An HTTP/1.1 server with /v1/chat/completions: follows the prompt's rules, or fails as `fault` says.

    `fault(body, number)` returns the fault to produce for a request, or None to answer it.
    """

    def __init__(self, fault=lambda body, number: None, judge=quality, delay=0.0, retry_after="0.05"):
        self.fault = fault
        self.judge = judge
        self.delay = delay
        self.retry_after = retry_after
        self.times = []
        self.counts = Counter()
        self.bodies = []
        self.keys = []
        self.in_flight = self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _main(self):
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    async def _connection(self, reader, writer):
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        headers = {}
        for line in head.split("\r\n")[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        assert head.startswith("POST /v1/chat/completions ")
        self.bodies.append(body)
        fault = self.fault(body, len(self.bodies))
        self.times.append(time.monotonic())
        self.keys.append(headers.get("authorization"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            return await self._reply(fault, body, writer, reader)
        finally:
            self.in_flight -= 1

    async def _reply(self, fault, body, writer, reader):
        self.counts[fault] += 1
        status, headers, message, finish = 200, {}, {"role": "assistant", "content": ""}, "stop"
        if fault == "timeout":
            await reader.read()  # until the client gives up
            return False
        if fault == "connection":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
            await writer.drain()
            return False
        if fault == "rate_limit":
            status, headers = 429, {"Retry-After": self.retry_after}
        elif fault == "server_error":
            status = random.Random(len(self.bodies)).choice([500, 502, 503, 529])
        elif fault == "rejected":
            status = 401
        elif fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that"}
        elif fault == "filtered":
            finish = "content_filter"
        elif fault == "cut":
            finish, message["content"] = "length", '{"ranking": [["'
        elif fault == "all thought":
            finish, message["content"] = "length", None
        else:
            message["content"] = self._verdict(body, fault)
        if status == 200:
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            payload = {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}
            text = json.dumps(payload)
        else:
            text = json.dumps(
                {"error": {"message": f"no luck with {self.keys[-1]}, known is sk-ab******wxyz"}}
            )
        if fault == "malformed_body":
            text = text[: len(text) // 2]
        lines = [
            f"HTTP/1.1 {status} X",
            "Content-Type: application/json",
            f"Content-Length: {len(text.encode())}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + text.encode())
        await writer.drain()
        return True

    def _verdict(self, body, fault):
        answers = read_answers(body)
        if "better" in body["messages"][0]["content"]:
            (first, a), (second, b) = ((answer["id"], self.judge(answer["text"])) for answer in answers)
            return json.dumps({"better": "tie" if a == b else first if a > b else second})
        if '"score"' in body["messages"][0]["content"]:
            [answer] = answers
            return json.dumps({"score": self.judge(answer["text"])})
        levels = sorted({self.judge(answer["text"]) for answer in answers}, reverse=True)
        tiers = [[a["id"] for a in answers if self.judge(a["text"]) == level] for level in levels]
        if fault == "malformed":
            return "Sure! Here it is: " + json.dumps({"ranking": tiers, "cannot_judge": []})
        if fault == "missing_ids":
            tiers = tiers[1:]
        elif fault == "duplicate_ids":
            tiers.append(tiers[0])
        elif fault == "unknown_ids":
            tiers.append(["A"])
        return json.dumps({"ranking": tiers, "cannot_judge": []})


def read_answers(body):
    """What a judge that follows the rules takes for the answers: the lines of the last block."""
    text = body["messages"][1]["content"][-1]["text"]
    lines = text.split("\n")
    assert lines.count("<answers>") == lines.count("</answers>") == 1
    assert lines[-1] == "</answers>"
    return [json.loads(line) for line in lines[lines.index("<answers>") + 1 : -1]]


RIGHT = "a red square moves left"
RESPONSES = (RIGHT, "a red square moves right", "a red circle", "nothing red", "nothing")


def request(name="r", responses=RESPONSES, **kwargs):
    return RankRequest(id=name, question=f"What happens in {name}?", responses=tuple(responses), **kwargs)


def oracle(server, **options):
    defaults = {
        "model": "judge",
        "base_url": server.url,
        "backoff": 0.01,
        "max_backoff": 0.05,
        "timeout": 20.0,
    }
    return ApiOracle(**{**defaults, **options})


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("protocol", "calls"), [("listwise", 4), ("pairwise", 20), ("network", 18), ("pointwise", 5)]
)
def test_every_protocol_finds_the_order(protocol, calls):
    shuffled = [RESPONSES[i] for i in (3, 0, 4, 2, 1)]
    with Judge() as server:
        judge = oracle(server, protocol=protocol)
        (ranking,) = judge.rank([request(responses=shuffled)])
    assert ranking.ranks == (3, 0, 4, 2, 1)
    assert ranking.confidence == 1.0
    assert ranking.error is None
    assert ranking.tokens == 110 * calls
    assert ranking.seconds > 0.0
    assert len(server.bodies) == judge.stats()["oracle/api/requests"] == calls
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_equal_texts_are_shown_once_and_tie():
    with Judge() as server:
        (ranking, alike) = oracle(server).rank(
            [request(responses=("nothing", RIGHT, "nothing ", RIGHT)), request(responses=("x", "x"))]
        )
    assert ranking.ranks == (1, 0, 1, 0)
    assert all(len(read_answers(body)) == 2 for body in server.bodies)
    assert alike.ranks == (0, 0)
    assert alike.tokens == 0


def test_frames_are_sent_as_images_with_their_times():
    frames = torch.zeros(6, 32, 64, 3, dtype=torch.uint8)
    frames[:, :, :, 0] = torch.arange(6)[:, None, None] * 40
    clip = Clip(frames, tuple(i / 2 for i in range(6)), key="k")
    with Judge() as server:
        judge = oracle(server, orders=2, frames_per_clip=3, image_size=16)
        assert judge.rank([request(clips=(clip,))])[0].valid
        blind = oracle(server, orders=2, use_clips=False)
        assert blind.rank([request(clips=(clip,))])[0].valid
    from PIL import Image

    content = server.bodies[0]["messages"][1]["content"]
    images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert [part["text"] for part in content if part["type"] == "text"][:4] == [
        "Video 1:",
        "0.5 s",
        "1.5 s",
        "2.5 s",
    ]
    assert len(images) == 3
    for url, red in zip(images, (40, 120, 200)):
        image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        assert image.size == (16, 8)
        assert abs(image.getpixel((8, 4))[0] - red) < 8
    assert len(server.bodies[2]["messages"][1]["content"]) == 1


def test_the_schema_is_declared_as_asked():
    with Judge() as server:
        for response_format in ("json_schema", "json_object", "none"):
            oracle(server, orders=1, response_format=response_format).rank([request()])
    schema, plain, none = server.bodies
    ids = {answer["id"] for answer in read_answers(schema)}
    wire = schema["response_format"]["json_schema"]
    assert wire["strict"] is True
    assert set(wire["schema"]["properties"]["cannot_judge"]["items"]["enum"]) == ids
    assert plain["response_format"] == {"type": "json_object"}
    assert "response_format" not in none


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


@pytest.mark.parametrize("secret", ["open sesame", "hf_abcdefghijkl"])
def test_a_key_of_any_form_is_removed_from_what_a_server_echoes(monkeypatch, secret):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with Judge(fault=lambda body, number: "rejected") as server:
        [ranking] = oracle(server).rank([request()])
    assert server.keys[0] == f"Bearer {secret}"
    assert "no luck with" in ranking.error
    assert secret not in repr(ranking)
    assert "sk-ab" not in repr(ranking)  # servers name keys in part


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


def test_works_inside_a_running_event_loop():
    async def notebook():
        return oracle(server).rank([request()])

    with Judge() as server:
        assert asyncio.run(notebook())[0].valid


def test_concurrency_is_bounded():
    with Judge(delay=0.05) as server:
        oracle(server, concurrency=3).rank([request(f"g{n}") for n in range(6)])
    assert server.most_in_flight == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "ftp://x"}, "http"),
        ({"base_url": f"http://u:{KEY}@x/v1"}, "user, password"),
        ({"protocol": "guess"}, "protocol"),
        ({"protocol": "likelihood"}, "protocol"),
        ({"orders": 0}, "orders"),
        ({"response_format": "xml"}, "response_format"),
        ({"api_key": KEY}, "environment variable"),
        ({"extra_body": {"headers": [{"Authorization": KEY}]}}, "environment variable"),
        ({"api_key_env": KEY}, "name of an environment variable"),
        ({"concurrency": 0}, "concurrency"),
        ({"deadline": 0}, "deadline"),
        ({"frames_per_clip": 0}, "'frames_per_clip' must be at least 1, got 0"),
        ({"image_size": 0}, "'image_size' must be at least 1, got 0"),
        ({"max_tokens": 0}, "'max_tokens' must be at least 1, got 0"),
        ({"temperature": -0.5}, "'temperature' must be at least 0, got -0.5"),
        ({"backoff": -1}, "'backoff' must be at least 0, got -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_oracle("api", **{"model": "m", "base_url": "http://localhost:1/v1", **options})
    assert KEY not in str(caught.value)


def test_needs_an_address_and_a_clean_key(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UsageError, match="base_url"):
        build_oracle("api", model="m")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2028secret")
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        ApiOracle(model="m", base_url="http://localhost:1/v1").rank([request()])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("package", ["httpx", "tenacity"])
def test_a_missing_package_is_named_before_anything_is_asked(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it then fails
    with pytest.raises(RlaifFastError, match=rf"the api oracle needs {package}.*'rlaif-fast\[judge\]'"):
        build_oracle("api", model="m", base_url="http://localhost:1/v1")
