"""Bytes on the wire of a judge: slow, damaged and hostile replies over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import strategies as st

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
from fuzzing import counts, fuzz
from wire_parts import GROUP, ask_all, completion

from rlaif_fast.oracle import build_oracle
from rlaif_fast.oracle.api import ApiOracle

REPLY = json.dumps(completion()).encode()


@contextmanager
def raw_server(script):
    """A server that runs `script(connection)` for each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve():
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=guarded, args=(connection,), daemon=True).start()

    def guarded(connection):
        with connection:
            try:
                connection.recv(1 << 20)
                script(connection, ended)
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        ended.set()
        listener.close()


def drip(head, part):
    def script(connection, ended):
        connection.sendall(head)
        while not ended.is_set():
            connection.sendall(part)
            time.sleep(0.05)

    return script


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "script",
    [
        drip(OK + b"Content-Length: 100000\r\n\r\n", b" "),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        drip(OK + b"Content-Encoding: gzip\r\nContent-Length: 100000\r\n\r\n", b"\x1f"),
        drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        drip(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n", b"x"),
        drip(b"", b"H"),
    ],
    ids=["length", "chunked", "gzip", "headers", "error", "garbage"],
)
def test_a_reply_that_drips_holds_its_slot_for_one_timeout(script):
    with raw_server(script) as url:
        oracle = ApiOracle(
            model="m", base_url=url, protocol="pairwise", orders=1, timeout=0.5, deadline=20.0, max_attempts=1
        )
        start = time.monotonic()
        [ranking] = oracle.rank([GROUP])
        assert time.monotonic() - start < 8.0
    assert not ranking.valid
    assert ranking.error


@pytest.mark.parametrize("cases", counts(60, 2_000))
def test_any_bytes_on_the_wire_are_a_fault(cases):
    sent = [b""]
    parts = st.sampled_from(
        [
            OK,
            b"HTTP/1.1 ",
            b"200",
            b" OK\r\n",
            b"\r\n\r\n",
            b"Content-Length: ",
            b"-1",
            b"9" * 400,
            b"Transfer-Encoding: chunked",
            b"\r\n",
            b"Content-Encoding: gzip\r\n",
            b"ffffffffffffffff\r\n",
            b"Set-Cookie: a=b; Max-Age=x\r\n",
            b"\x00",
            REPLY,
        ]
    )

    def script(connection, ended):
        connection.sendall(sent[0])

    with raw_server(script) as url:

        def check(case):
            sent[0] = b"".join(case)
            oracle = ApiOracle(
                model="m", base_url=url, protocol="pairwise", orders=1, timeout=2.0, max_attempts=1
            )
            [ranking] = oracle.rank([GROUP])
            assert ranking.valid or ranking.error

        fuzz(st.lists(parts | st.binary(max_size=8), max_size=10), check, cases, "streams")


def test_a_hostile_judge_stops_no_run():
    bodies = [REPLY[:-1] + b', "usage": {"prompt_tokens": 1e999}}', b"[" * 100_000, b"{", b"\xff\xfe", b""]
    outcomes, oracle = ask_all([(200, {}, body) for body in bodies])
    assert [outcome.error is None for outcome in outcomes] == [True, False, False, False, False]
    assert oracle.stats()["oracle/api/fault_malformed_body"] == 4.0
    assert build_oracle("api", model="m", base_url="http://judge/v1").name == "api"
