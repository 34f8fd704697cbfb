"""The api oracle over real HTTP: a rule-following judge, and a server that produces every failure."""

from __future__ import annotations

import asyncio
import base64
import datetime
import io
import sys

import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
from api_judge import RESPONSES, RIGHT, Judge, oracle, read_answers, request

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.oracle import build_oracle
from rlaif_fast.oracle.api import ApiOracle
from rlaif_fast.video.base import Clip

KEY = "sk-test-0123456789abcdef"


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


@pytest.mark.parametrize("secret", ["open sesame", "hf_abcdefghijkl"])
def test_a_key_of_any_form_is_removed_from_what_a_server_echoes(monkeypatch, secret):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with Judge(fault=lambda body, number: "rejected") as server:
        [ranking] = oracle(server).rank([request()])
    assert server.keys[0] == f"Bearer {secret}"
    assert "no luck with" in ranking.error
    assert secret not in repr(ranking)
    assert "sk-ab" not in repr(ranking)  # servers name keys in part


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
        ({"base_url": f"http://x:{KEY}/v1"}, "an http.s. address"),
        ({"base_url": "http://x:99999/v1"}, "an http.s. address"),
        ({"base_url": "http://[::1/v1"}, "an http.s. address"),
        ({"base_url": "http://x y/v1"}, "an http.s. address"),
        ({"base_url": "http://x/v1#here"}, "query or fragment"),
        ({"base_url": "http://x/v1/chat/completions/"}, "must end before /chat/completions"),
        ({"protocol": "guess"}, "protocol"),
        ({"protocol": "likelihood"}, "protocol"),
        ({"orders": 0}, "orders"),
        ({"response_format": "xml"}, "response_format"),
        ({"api_key": KEY}, "environment variable"),
        ({"extra_body": {"headers": [{"Authorization": KEY}]}}, "environment variable"),
        ({"extra_body": {"headers": [[{"Authorization": KEY}]]}}, "environment variable"),
        ({"api_key_env": KEY}, "name of an environment variable"),
        ({"concurrency": 0}, "concurrency"),
        ({"deadline": 0}, "deadline"),
        ({"frames_per_clip": 0}, "'frames_per_clip' must be at least 1, got 0"),
        ({"image_size": 0}, "'image_size' must be at least 1, got 0"),
        ({"max_tokens": 0}, "'max_tokens' must be at least 1, got 0"),
        ({"temperature": -0.5}, "'temperature' must be at least 0, got -0.5"),
        ({"temperature": float("inf")}, "'temperature' must be JSON, got inf"),
        ({"backoff": -1}, "'backoff' must be at least 0, got -1"),
        ({"extra_body": {"since": datetime.date(2025, 1, 1)}}, "'extra_body' must be JSON"),
        ({"extra_body": {"top_p": float("nan")}}, "'extra_body' must be JSON"),
        ({"extra_body": {"messages": None}}, "'extra_body' must leave 'messages' out"),
        ({"extra_body": {"stream": True}}, "'extra_body' must leave 'stream' out"),
        ({"extra_body": {"n": 2}}, "'extra_body' must leave 'n' out"),
        ({"use_clips": False, "frames_per_clip": 4}, "'frames_per_clip' is not read with use_clips=False"),
        ({"use_clips": False, "image_size": 224}, "'image_size' is not read with use_clips=False"),
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


def test_spaces_around_the_address_are_no_part_of_it(monkeypatch):
    with Judge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f" {server.url}/\n")
        [ranking] = build_oracle("api", model="m").rank([request()])
    assert ranking.valid


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SSL_CERT_FILE", "/nowhere/certificates.pem", "FileNotFoundError"),
        ("HTTP_PROXY", "ftp://proxy", "scheme"),
    ],
)
def test_what_the_environment_says_of_connections_is_named_where_it_cannot_be(
    monkeypatch, variable, value, reason
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"cannot open connections: .*{reason}.*{variable}"):
        ApiOracle(model="m", base_url="http://localhost:1/v1").rank([request()])


@pytest.mark.parametrize("package", ["httpx", "tenacity"])
def test_a_missing_package_is_named_before_anything_is_asked(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it then fails
    with pytest.raises(RlaifFastError, match=rf"the api oracle needs {package}.*'rlaif-fast\[judge\]'"):
        build_oracle("api", model="m", base_url="http://localhost:1/v1")
