"""A judge that cannot be asked is told before training, in seconds and with the reason."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from test_oracle_sockets import REPLY, raw_server

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.oracle import build_oracle
from rlaif_fast.oracle.preflight import ask_once
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import preflight


def replying(status, body):
    def script(connection, ended):
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    return script


FAILURES = [
    (replying(401, b'{"error": "bad key sk-abcdefgh1234"}'), "HTTP 401"),
    (replying(404, b'{"error": "no model m"}'), "HTTP 404.*no model m"),
    (replying(500, b""), "HTTP 500"),
    (replying(200, b"<html>a proxy's page</html>"), "not a chat completion"),
    (
        replying(200, json.dumps({"choices": [{"message": {"content": "B is better"}}]}).encode()),
        "not one JSON",
    ),
    (replying(200, json.dumps({"choices": [{"message": {"content": None}}]}).encode()), "no content"),
    (lambda connection, ended: None, "Remote|disconnected|Error"),
]


def options(url):
    return {
        "model": "m",
        "base_url": url,
        "protocol": "pairwise",
        "orders": 1,
        "timeout": 2.0,
        "backoff": 0.01,
    }


@pytest.mark.parametrize(("script", "words"), FAILURES)
def test_a_judge_that_gives_no_verdict_is_refused_before_training(script, words):
    with raw_server(script) as url:
        start = time.monotonic()
        config = TrainConfig(oracle="api", oracle_options=options(url))
        with pytest.raises(RlaifFastError, match=words) as caught:
            preflight(config)
        assert time.monotonic() - start < 20.0
    assert "'m'" in str(caught.value)
    assert "sk-abcdefgh" not in str(caught.value)


def test_no_server_is_told_at_once():
    with pytest.raises(RlaifFastError, match=r"127\.0\.0\.1:9"):
        ask_once(build_oracle("api", **options("http://127.0.0.1:9/v1")))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda api, cache: build_oracle(**api),
        lambda api, cache: build_oracle(**api, cache=cache),
        lambda api, cache: build_oracle("corrupted", inner=api, kind="flips", strength=0.1),
        lambda api, cache: build_oracle(
            "shuffled", inner={"name": "corrupted", "inner": api, "kind": "gaussian"}
        ),
        lambda api, cache: build_oracle("ensemble", members=["reference", api]),
    ],
)
def test_a_judge_is_found_inside_others_and_asked_once(tmp_path, wrap):
    asked = []

    def script(connection, ended):
        asked.append(1)
        replying(200, REPLY)(connection, ended)

    with raw_server(script) as url:
        ask_once(wrap({"name": "api", **options(url)}, tmp_path / "c.sqlite"))
    assert len(asked) == 1


def test_other_oracles_are_left_alone():
    asked = []
    ask_once(build_oracle("callable", function=asked.append))
    ask_once(build_oracle("reference"))
    assert asked == []
