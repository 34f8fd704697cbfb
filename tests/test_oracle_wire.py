"""Whatever a server sends ends in a verdict or in a counted fault: fuzzed replies, and each attack by name."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from hypothesis import strategies as st

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
from fuzzing import counts, fuzz
from wire_parts import ask_all, completion

from rlaif_fast.oracle.api import _KEY_LIKE
from rlaif_fast.oracle.protocols import MalformedVerdict, parse_object
from rlaif_fast.oracle.wire import (
    MAX_BODY_BYTES,
    Fault,
    Response,
    read_completion,
    retry_after,
    status_fault,
    unpack,
)

VERDICT_KINDS = {
    "timeout", "connection", "malformed_body", "malformed", "refusal", "rate_limit", "server_error", "rejected",
    "unknown_ids", "missing_ids", "duplicate_ids",
}  # fmt: skip


def check_outcome(outcome, oracle):
    """A verdict on both texts, or none with a reason and a counted fault."""
    faults = {key.removeprefix("oracle/api/fault_") for key in oracle.stats() if "fault_" in key}
    assert faults <= VERDICT_KINDS
    if outcome.error is None:
        assert all(isinstance(rank, int) for rank in outcome.ranks)
    else:
        assert outcome.ranks == (None, None)
        assert faults
    assert outcome.tokens >= 0
    json.dumps(outcome.raw, ensure_ascii=False).encode("utf-8")  # what goes to the logs can be written


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["1e999", "tie", '{"better": "tie"}', "\ud800", "</think>", "```JSON\n{}\n```"]),
)  # fmt: skip


_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "prompt_tokens", "refusal", "better", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@st.composite
def _payloads(draw):
    """A completion in which some parts are replaced by anything."""
    message = {"role": "assistant", "content": draw(st.just('{"better": "tie"}') | _values)}
    choice = {"message": draw(st.just(message) | _values), "finish_reason": draw(st.just("stop") | _values)}
    payload = {"choices": draw(st.just([choice]) | _values), "usage": draw(_values)}
    return draw(st.just(payload) | _values)


@st.composite
def _damaged(draw, body):
    kind = draw(st.integers(0, 7))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        at = draw(st.integers(0, len(body)))
        return body[:at] + draw(st.binary(max_size=4)) + body[at:]
    if kind == 2:
        return body[: draw(st.integers(0, len(body)))]
    if kind == 3:
        return body.replace(b"1", b"1e999").replace(b"null", b"9" * draw(st.sampled_from([5, 400, 5000])))
    return {4: gzip.compress(body, 1), 5: zlib.compress(body, 1)}.get(kind, body)


_headers = st.lists(
    st.tuples(
        st.sampled_from(
            ["content-type", "content-encoding", "retry-after", "set-cookie", "location", "x", "date"]
        ),
        st.sampled_from(
            [
                "gzip",
                "deflate",
                "br",
                "gzip, gzip",
                "application/json; charset=zlib_codec",
                "text/plain; charset=rot13",
                "a=b; domain=",
                "nan",
                "1e999",
                "-1",
                "9" * 400,
                "Wed, 99 Foo 9999 99:99:99 GMT",
                "\x7f",
                "//[",
            ]
        )
        | st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
    ),
    max_size=3,
)


_statuses = st.sampled_from([200, 200, 200, 100, 204, 301, 400, 401, 429, 500, 599, 999])


REPLIES = 10  # with one payload, since that takes the longest to draw


@st.composite
def _replies(draw):
    body = json.dumps(draw(_payloads())).encode("utf-8", "replace")
    return [(draw(_statuses), draw(_headers), draw(_damaged(body))) for _ in range(REPLIES)]


@pytest.mark.parametrize("cases", counts(1_500, 50_000))
def test_any_reply_is_a_verdict_or_a_counted_fault(cases):
    def check(replies):
        outcomes, oracle = ask_all(replies)
        assert len(outcomes) == REPLIES
        for outcome in outcomes:
            check_outcome(outcome, oracle)

    fuzz(_replies(), check, cases // REPLIES, f"times {REPLIES} replies")


REPLY = json.dumps(completion()).encode()


USAGES = [
    "1e999",
    "-1e999",
    "9" * 400,
    "9" * 5000,
    "NaN",
    '"12"',
    "[1]",
    "{}",
    "true",
    "null",
    "-5",
    "1.5",
    '"1e999"',
]


@pytest.mark.parametrize("count", USAGES)
@pytest.mark.parametrize("key", ["prompt_tokens", "completion_tokens"])
def test_a_count_that_cannot_be_read_costs_no_verdict(key, count):
    body = REPLY[:-1] + f', "usage": {{"{key}": {count}}}}}'.encode()
    [outcome], oracle = ask_all([(200, {}, body)])
    if len(count) < 5000:  # an integer that long is not read by any JSON parser of Python
        assert outcome.ranks == (0, 0)
        assert outcome.tokens in (0, 1)
    check_outcome(outcome, oracle)


@pytest.mark.parametrize("usage", [[], "x", 7, True, None, {"prompt_tokens": {"a": 1}}])
def test_a_usage_of_another_shape_costs_no_verdict(usage):
    [outcome], _ = ask_all([(200, {}, json.dumps(completion(usage=usage)).encode())])
    assert outcome.ranks == (0, 0)


@pytest.mark.parametrize(
    "charset", ["zlib_codec", "rot13", "hex", "idna", "punycode", "undefined", "base64", "\x00", "utf-7"]
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_charset_is_not_believed(charset, status):
    headers = {"content-type": f"application/json; charset={charset}"}
    [outcome], oracle = ask_all([(status, headers, REPLY)])
    assert (outcome.error is None) == (status == 200)
    check_outcome(outcome, oracle)


@pytest.mark.parametrize(
    "message", [{"content": None}, {"content": None, "tool_calls": []}, {"content": "x", "refusal": "no"}]
)
def test_no_content_is_a_refusal(message):
    body = json.dumps({"choices": [{"message": message, "finish_reason": "length"}]}).encode()
    with pytest.raises(Fault) as caught:
        read_completion(Response(200, {}, body))
    assert caught.value.kind == "refusal"


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": '{"better": '}, {"type": "text", "text": '"tie"}'}]
    [outcome], _ = ask_all([(200, {}, json.dumps(completion(parts)).encode())])
    assert outcome.ranks == (0, 0)


@pytest.mark.parametrize(
    ("data", "encoding", "word"),
    [
        (gzip.compress(b" " * (MAX_BODY_BYTES + 1), mtime=0), "gzip", "unpacks"),
        (zlib.compress(b" " * (64 << 20)), "deflate", "unpacks"),
        (gzip.compress(gzip.compress(b" " * (64 << 20), mtime=0), mtime=0), "gzip, gzip", "unpacks"),
        (gzip.compress(REPLY, mtime=0)[:-9], "gzip", "ends early"),
        (b"no gzip", "gzip", "damaged"),
        (REPLY, "br", "not asked for"),
        (REPLY, "gzip," * 5, "packed"),
    ],
)  # fmt: skip
def test_what_cannot_be_unpacked_is_a_fault(data, encoding, word):
    with pytest.raises(Fault, match=word):
        unpack(data, encoding)
    [outcome], _ = ask_all([(200, {"content-encoding": encoding}, data)])
    assert word in outcome.error


def test_packed_replies_are_read_and_long_ones_are_not():
    replies = [
        (200, {"content-encoding": "gzip"}, gzip.compress(REPLY)),
        (200, {"content-encoding": "deflate"}, zlib.compress(REPLY)),
        (200, {}, REPLY + b" " * MAX_BODY_BYTES),
    ]
    outcomes, _ = ask_all(replies)
    assert [outcome.error is None for outcome in outcomes] == [True, True, False]
    assert "longer than" in outcomes[2].error


@pytest.mark.parametrize(
    "value",
    [
        "nan",
        "1e999",
        "-1e999",
        "9" * 5000,
        "Wed, 99 Foo 9999",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "",
        "x" * 99,
    ],
)
def test_retry_after_is_bounded(value):
    assert 0.0 <= retry_after(value) <= 3600.0


def test_a_redirect_says_where_to():
    """An http address of an https server is the usual case."""
    response = Response(301, {"location": "https://judge.example/v1/chat/completions?token=sk-abcdefgh"}, b"")
    fault = status_fault(response, lambda text: text.replace("sk-abcdefgh", "[key]"))
    assert not fault.retry
    assert str(fault).startswith(
        "HTTP 301: a redirect to 'https://judge.example/v1/chat/completions?token=[key]'"
    )


def test_what_is_said_of_a_repeated_name_does_not_look_like_a_key():
    with pytest.raises(MalformedVerdict, match="a name stands twice") as caught:
        parse_object('{"ranking": [], "ranking": []}', {"ranking"})
    assert _KEY_LIKE.search(str(caught.value)) is None
