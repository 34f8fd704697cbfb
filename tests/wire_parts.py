"""Replies of a judge, and what an oracle makes of them."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
import httpx

from rlaif_fast.oracle import RankRequest
from rlaif_fast.oracle.api import ApiOracle, _Session

GROUP = RankRequest("g", "Which?", ("a red square", "a blue circle"))


def completion(content='{"better": "tie"}', **fields):
    return {
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        **fields,
    }


def ask_all(replies, **options):
    """Rank one group for each (status, headers, body) of `replies`; the rankings and the oracle."""
    oracle = ApiOracle(
        model="m",
        base_url="http://judge/v1",
        protocol="pairwise",
        orders=1,
        max_attempts=1,
        timeout=5.0,
        **options,
    )

    async def run():
        queue = list(replies)

        async def handler(request):
            status, headers, body = queue.pop(0)
            return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

        client = httpx.AsyncClient(transport=httpx.MockTransport(handler))

        async def connect():
            return client

        outcomes = []
        async with client:
            for _ in replies:
                session = _Session(oracle, connect, "sk-secret-0123456789")
                [showing], _places = oracle._show(GROUP)
                outcomes.append(await session.run(showing))
        return outcomes

    return asyncio.run(run()), oracle
