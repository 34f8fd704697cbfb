"""One request to a chat-completions endpoint, and its result: a reply, or a fault that is counted.

Nothing that a server sends can end the run: the body is read under one budget of time and size, decoded as UTF-8
whatever its headers claim, and processed only inside `read_completion` and `status_fault`, from which nothing but a
`Fault` escapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.option_types import check_json

MAX_BODY_BYTES = 4 << 20  # of a reply, as sent and again when unpacked
MAX_WAIT_SECONDS = 3600.0  # longest Retry-After that is obeyed
_MOST_TOKENS = 1 << 40  # a larger count is not believed
_REASONING = ("thinking", "reasoning")  # types of content parts that are not the reply
_FIXED = {
    "messages": (),
    "stream": (False, None),
    "n": (1, None),
}  # fields of a request, and what they may be
_RETRIED_STATUS = {408, 409, 425, 429}


class Fault(Exception):
    """An attempt that brought no usable verdict.

    Args:
        kind: What it counts as.
        detail: One line for the log.
        retry: Whether another try may help.
        wait: Seconds that the server asks to wait before the next try.
        partial: What can still be used if no better reply comes.
    """

    def __init__(self, kind: str, detail: str, *, retry: bool = True, wait: float = 0.0, partial: Any = None):
        super().__init__(detail)
        self.kind = kind
        self.retry = retry
        self.wait = wait
        self.partial = partial


@dataclass(frozen=True)
class Response:
    """What a server sent: status, headers (lower case) and the unpacked body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Completion:
    """The text of a chat completion; `cut` means that it stopped at the token limit."""

    content: str
    cut: bool = False


def endpoint(base_url: str | None) -> str:
    """The address that the option or the environment gives, without spaces around it or a final slash.

    Raises:
        UsageError: There is none, or requests cannot be sent below it; secrets in it are not shown.
    """
    base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or "").strip().rstrip("/")
    if not base_url:
        raise UsageError("oracle 'api' needs option 'base_url' (or the variable OPENAI_BASE_URL)")
    try:
        parts = urlsplit(base_url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # malformed brackets or port
        whole = False
    if not whole or not base_url.isprintable() or " " in base_url:
        raise UsageError(
            "oracle option 'base_url' must be an http(s) address such as http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "oracle option 'base_url' must hold no user, password, query or fragment; use api_key_env"
        )
    if parts.path.endswith("/chat/completions"):
        raise UsageError("oracle option 'base_url' must end before /chat/completions, which is added to it")
    return base_url


def checked_extra(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `extra_body` adds to a request.

    Raises:
        UsageError: JSON has no such value, or a field would replace the prompt or bring a reply that is not read.
    """
    check_json(extra_body=dict(fields))
    for name, allowed in _FIXED.items():
        if name in fields and fields[name] not in allowed:
            raise UsageError(
                f"oracle option 'extra_body' must leave {name!r} out: the prompt is ours, and one whole reply is read"
            )
    return dict(fields)


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """If httpx cannot use the environment's settings for certificates and proxies, name the variables."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"oracle 'api' cannot open connections: {type(error).__name__}: {error}; check the variables "
            "SSL_CERT_FILE, SSL_CERT_DIR and those of proxies (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)"
        ) from None


async def post(client: Any, url: str, body: Mapping[str, Any], timeout: float) -> Response:
    """Send one request and read the whole reply within `timeout` seconds.

    Args:
        client: An `httpx.AsyncClient`.
        url: Where to send it.
        body: The request, as JSON.
        timeout: Seconds for everything: connecting, waiting, and reading a body however slowly it drips.

    Raises:
        Fault: Of kind "timeout", "connection" or "malformed_body".
    """
    try:
        return await asyncio.wait_for(_exchange(client, url, body), timeout)
    except (asyncio.TimeoutError, TimeoutError):
        raise Fault("timeout", f"no reply within {timeout:g} s") from None
    except Fault:
        raise
    except Exception as error:  # httpx's own errors, and whatever a hostile reply raises below it
        if "Timeout" in type(error).__name__:
            raise Fault("timeout", f"no reply within {timeout:g} s ({type(error).__name__})") from None
        raise Fault("connection", f"{type(error).__name__}: {error}".rstrip(": ")) from None


async def _exchange(client: Any, url: str, body: Mapping[str, Any]) -> Response:
    parts = bytearray()
    asked = {"Accept-Encoding": "identity"}
    async with client.stream("POST", url, json=body, headers=asked) as response:
        async for part in response.aiter_raw():
            parts += part
            if len(parts) > MAX_BODY_BYTES:
                raise Fault("malformed_body", f"the reply is longer than {MAX_BODY_BYTES} bytes")
        headers = {key.lower(): value for key, value in response.headers.items()}
        status = response.status_code
    return Response(status, headers, unpack(bytes(parts), headers.get("content-encoding", "")))


def unpack(data: bytes, encoding: str) -> bytes:
    """`data` without its content encodings, at most `MAX_BODY_BYTES` of it.

    Raises:
        Fault: If the encoding is unknown, the data are damaged, or they unpack to more than that.
    """
    names = [name.strip().casefold() for name in encoding.split(",")]
    if len(names) > 4:
        raise Fault("malformed_body", f"the reply is packed {len(names)} times")
    for name in reversed(names):
        if name in ("", "identity"):
            continue
        if name not in ("gzip", "x-gzip", "deflate"):
            raise Fault(
                "malformed_body", f"the reply has the content encoding {name[:40]!r}, which was not asked for"
            )
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip, by the header
        try:
            data = unpacker.decompress(data, MAX_BODY_BYTES + 1)
        except zlib.error:
            raise Fault("malformed_body", "the reply's compression is damaged") from None
        if len(data) > MAX_BODY_BYTES:
            raise Fault("malformed_body", f"the reply unpacks to more than {MAX_BODY_BYTES} bytes")
        if not unpacker.eof:
            raise Fault("malformed_body", "the reply's compression ends early")
    return data


def read_usage(response: Response) -> dict[str, int]:
    """The token counts that a reply of status 200 reports, even a refusal; those that can be read, by name."""
    try:
        usage = json.loads(response.body.decode("utf-8", "replace"))["usage"]
        counts = {key: _count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens")}
    except Exception:  # remote data of whatever shape must not end the run
        return {}
    return {key: count for key, count in counts.items() if count is not None}


def read_completion(response: Response, redact: Callable[[str], str] = str) -> Completion:
    """The completion in a reply of status 200.

    Args:
        response: The reply.
        redact: Removes secrets from a text, before it is cut.

    Raises:
        Fault: Of kind "refusal" or "malformed_body".
    """
    try:
        return _completion(json.loads(response.body.decode("utf-8", "replace")))
    except Fault:
        raise
    except Exception as error:  # as above
        reason = f"the reply is not a chat completion ({type(error).__name__}): {_start(response, redact)}"
        raise Fault("malformed_body", reason) from None


def _completion(payload: Any) -> Completion:
    choice = payload["choices"][0]
    message = choice["message"]
    finish = choice.get("finish_reason")
    if message.get("refusal") or finish == "content_filter":
        raise Fault("refusal", "the judge refused")
    content = message["content"]
    if content is None:
        why = "; raise the option 'max_tokens'" if finish == "length" else ""
        raise Fault("refusal", f"the judge gave no content (finish_reason {str(finish)[:40]!r}){why}")
    if isinstance(content, list):  # content parts
        content = "".join(part["text"] for part in content if part.get("type") not in _REASONING)
    if not isinstance(content, str):
        raise Fault("malformed_body", "the reply holds no text")
    return Completion(content, cut=finish == "length")


def _count(value: Any) -> int | None:
    """A number of tokens; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value)


def status_fault(response: Response, redact: Callable[[str], str] = str) -> Fault:
    """The fault for a reply of any status but 200; `redact` as for `read_completion`."""
    status = response.status
    detail = f"HTTP {status}: {_start(response, redact)}"
    if 300 <= status < 400:  # not followed: the key would go to another server
        place = redact(response.headers.get("location", "nowhere"))[:200]
        detail = f"HTTP {status}: a redirect to {place!r}; set base_url to where it leads"
    wait = retry_after(response.headers.get("retry-after"))
    if status == 429:
        return Fault("rate_limit", detail, wait=wait)
    if status >= 500:
        return Fault("server_error", detail, wait=wait)
    return Fault("rejected", detail, retry=status in _RETRIED_STATUS)


def _start(response: Response, redact: Callable[[str], str]) -> str:
    """The beginning of a reply, on one line."""
    return redact(" ".join(response.body.decode("utf-8", "replace").split()))[:200]


def retry_after(value: str | None) -> float:
    """Seconds a Retry-After header asks for, as a number or a date, at most an hour; 0 if it is unreadable."""
    if value is None:
        return 0.0
    try:
        seconds = float(value[:100])
    except ValueError:
        seconds = _seconds_until(value[:100])
    return min(max(0.0, seconds), MAX_WAIT_SECONDS) if not math.isnan(seconds) else 0.0


def _seconds_until(date: str) -> float:
    try:
        when = email.utils.parsedate_to_datetime(date)
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.timezone.utc)
        return (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
