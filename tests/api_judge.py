"""A judge behind a real HTTP server, with faults on request."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter

import pytest

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
from rlaif_fast.oracle import RankRequest
from rlaif_fast.oracle.api import ApiOracle


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
