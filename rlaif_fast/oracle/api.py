"""A judge behind an OpenAI-compatible chat-completions endpoint: a vLLM server, a hosted model.

Every failure the wire can produce ends in one of three ways: it is tried again (bounded, jittered, within the
deadline), the rest of the verdict is used without it, or the group is marked invalid with the reason. No
failure turns into a rank.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rlaif_fast.errors import UsageError, needed_by
from rlaif_fast.oracle.base import RankRequest
from rlaif_fast.oracle.grading import Grade, grade_ask
from rlaif_fast.oracle.images import encode_frames
from rlaif_fast.oracle.in_flight import InFlight
from rlaif_fast.oracle.judge import Judge, JudgeOptions, Outcome, Showing
from rlaif_fast.oracle.option_types import check_json, check_least, check_unread
from rlaif_fast.oracle.protocols import PROTOCOLS, Ask, MalformedVerdict
from rlaif_fast.oracle.records import request_text
from rlaif_fast.oracle.untrusted import cut_middle
from rlaif_fast.oracle.wire import (
    Completion,
    Fault,
    checked_extra,
    endpoint,
    opening,
    post,
    read_completion,
    read_usage,
    status_fault,
)
from rlaif_fast.video.base import Clip

T = TypeVar("T")

MAX_RAW_CHARS = 20_000  # characters of a reply kept for the log
_KEY_LIKE = re.compile(r"\b(?:sk|pk|key|hf|Bearer)[-_ ][\w*.\-]{6,}", re.IGNORECASE)
_RESPONSE_FORMATS = ("json_schema", "json_object", "none")


class ApiOracle(Judge):
    """Ranks by asking a model behind `POST {base_url}/chat/completions`; frames are sent as JPEG images.

    Args:
        model: The model's name at the endpoint.
        base_url: The endpoint, e.g. "http://localhost:8000/v1"; None reads the environment variable OPENAI_BASE_URL.
        api_key_env: Name of the environment variable that holds the key; unset or empty sends none. The key
            itself is never an option, so that it cannot end up in a config file.
        response_format: "json_schema" (structured output by the reply's schema), "json_object", or "none" for
            servers that take no `response_format`.
        temperature: Sampling temperature of the judge.
        max_tokens: Most tokens of a reply.
        concurrency: Most requests in flight.
        timeout: Seconds one request may take, including the body of its reply.
        deadline: Seconds one call of `rank` may take; groups unanswered by then are invalid.
        max_attempts: Most attempts per request.
        backoff: Seconds before the second try; doubled for each further one, jittered, at most `max_backoff`.
        max_backoff: Longest wait between tries, except when a server's Retry-After asks for more.
        frames_per_clip: Most frames sent per clip, evenly spaced.
        image_size: Longest side of a sent frame in pixels.
        extra_body: More fields for the request body, as the endpoint defines them; null leaves one of ours out.
        judge: The options of `JudgeOptions`.
    """

    name = "api"
    reads_metadata = False

    def __init__(
        self,
        *,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        response_format: str = "json_schema",
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrency: int = 16,
        timeout: float = 60.0,
        deadline: float = 300.0,
        max_attempts: int = 4,
        backoff: float = 0.5,
        max_backoff: float = 20.0,
        frames_per_clip: int = 8,
        image_size: int = 448,
        extra_body: Mapping[str, Any] | None = None,
        **judge: Any,
    ) -> None:
        super().__init__(JudgeOptions(**judge))
        if self.options.protocol not in PROTOCOLS:
            raise UsageError(
                f"oracle 'api' takes protocol {', '.join(PROTOCOLS)}, got {self.options.protocol!r}"
            )
        if response_format not in _RESPONSE_FORMATS:
            raise UsageError(f"oracle option 'response_format' must be one of {_RESPONSE_FORMATS}")
        of_frames = {"frames_per_clip": frames_per_clip, "image_size": image_size}
        check_least(1, concurrency=concurrency, max_attempts=max_attempts, max_tokens=max_tokens, **of_frames)
        check_least(0, temperature=temperature, backoff=backoff, max_backoff=max_backoff)
        check_json(temperature=temperature)
        if not self.options.use_clips:
            check_unread("with use_clips=False", ApiOracle, **of_frames)
        if timeout <= 0 or deadline <= 0:
            raise UsageError("oracle options 'timeout' and 'deadline' must be above 0 seconds")
        # If it is not a name, it may be the key itself, which must not be printed.
        if re.fullmatch(r"[A-Za-z_]\w*", api_key_env, re.ASCII) is None:
            raise UsageError(
                "oracle option 'api_key_env' must be the name of an environment variable; put the key into one"
            )
        self.model = model
        self.base_url = endpoint(base_url)
        self.api_key_env = api_key_env
        self.response_format = response_format
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.concurrency = concurrency
        self.timeout = timeout
        self.deadline = deadline
        self.max_attempts = max_attempts
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.frames_per_clip = frames_per_clip
        self.image_size = image_size
        self.extra_body = checked_extra(extra_body or {})
        self._counts: Counter[str] = Counter()
        self._grading: InFlight[Grade | None] = InFlight()
        with needed_by("the api oracle", "judge"):
            import httpx  # noqa: F401
            import tenacity  # noqa: F401

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request; the address is not part of it."""
        return (
            f"{super().identity} model={self.model} format={self.response_format} "
            f"temperature={self.temperature} max_tokens={self.max_tokens} "
            f"frames={self.frames_per_clip} size={self.image_size} "
            f"extra={json.dumps(self.extra_body, sort_keys=True)}"
        )

    def stats(self) -> dict[str, float]:
        """Counts since the start: requests, retries, prompt and completion tokens, faults by kind."""
        return {f"oracle/api/{key}": float(value) for key, value in sorted(self._counts.items())}

    def run_all(self, showings: Sequence[Showing]) -> list[Outcome]:
        """Ask about every showing, many at a time, and return within the deadline."""
        outcomes: dict[int, Outcome] = {}
        self.run_each(showings, outcomes.__setitem__)
        return [outcomes[at] for at in range(len(showings))]

    def run_each(self, showings: Sequence[Showing], tell: Callable[[int, Outcome], None]) -> None:
        """As `run_all`, but call `tell` with each showing's index and outcome as it arrives."""

        async def run(session: _Session, at: int) -> None:
            tell(at, await session.run(showings[at]))

        _run_in_loop(self._in_session(lambda session: [run(session, at) for at in range(len(showings))]))

    def grade(self, requests: Sequence[RankRequest]) -> list[Grade | None]:
        """Grade the one response of each request against its reference answer; None if there was no verdict."""
        words = [replace(request, clips=(), category="", metadata={}) for request in requests]

        def grade(places: list[int]) -> list[Grade | None]:
            asked = [words[place] for place in places]
            return _run_in_loop(self._in_session(lambda session: list(map(session.grade, asked))))

        return self._grading.run(list(map(request_text, words)), grade)

    async def _in_session(self, calls: Callable[[_Session], list[Coroutine[Any, Any, T]]]) -> list[T]:
        """Make all calls at once in one session."""
        import httpx

        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UsageError(f"the variable {self.api_key_env} holds characters that no key has; set it anew")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with contextlib.AsyncExitStack() as clients:
            with opening():
                # Making a TLS context reads the certificates from disk, so all clients share one.
                tls = httpx.create_ssl_context()

            async def connect() -> Any:
                with opening():
                    client = httpx.AsyncClient(headers=headers, timeout=self.timeout, verify=tls)
                return await clients.enter_async_context(client)

            return list(await asyncio.gather(*calls(_Session(self, connect, key))))


@dataclass
class _Tally:
    """What one showing has cost so far, and what went wrong last."""

    raw: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    fault: Fault | None = None


class _Session:
    """One call of `rank`: its clients, the key and the images.

    Every concurrency slot has its own client with one connection. A shared client's pool scans all its
    connections on every request, which costs 15 ms a request at 64 connections.
    """

    def __init__(self, oracle: ApiOracle, connect: Callable[[], Awaitable[Any]], key: str) -> None:
        self.oracle = oracle
        self.connect = connect
        self.free: list[Any] = []
        self.key = key
        self.counts = oracle._counts
        self.slots = asyncio.Semaphore(oracle.concurrency)
        self.served = 0  # requests that got past the rate limit
        self.resume = 0.0  # when the next request may be sent, in loop time
        self.end = asyncio.get_running_loop().time() + oracle.deadline
        self.images: dict[str, list[dict[str, Any]]] = {}

    async def run(self, showing: Showing) -> Outcome:
        tally = _Tally()
        protocol = PROTOCOLS[self.oracle.options.protocol]
        run = protocol(showing.request, showing.texts, showing.order, showing.salt)
        asks = next(run)
        while True:
            answers = await asyncio.gather(*(self.answer(showing.request.clips, ask, tally) for ask in asks))
            try:
                asks = run.send(answers)
            except StopIteration as end:
                ranks = end.value
                break
        judged = sum(rank is not None for rank in ranks)
        error = None if judged >= 2 else str(tally.fault or "the judge declined")
        return Outcome(ranks, tuple(tally.raw), tally.tokens, tally.seconds, error)

    async def grade(self, request: RankRequest) -> Grade | None:
        options = self.oracle.options
        ask = grade_ask(request, options.max_response_chars, options.extract)
        return await self.answer((), ask, _Tally())

    async def answer(self, clips: Sequence[Clip], ask: Ask, tally: _Tally) -> Any:
        """The parsed reply, else the last partly usable one; None if the attempts or the time ran out without
        either."""
        left = self.end - asyncio.get_running_loop().time()
        partial: list[Any] = []
        try:
            return await asyncio.wait_for(self._tries(clips, ask, tally, partial), timeout=left)
        except asyncio.TimeoutError:
            last = f"; last: {tally.fault}" if tally.fault else ""
            self._note(Fault("deadline", f"the deadline of {self.oracle.deadline:g} s passed{last}"), tally)
        except Fault:
            self.counts["gave_up"] += 1
        return partial[-1] if partial else None

    async def _tries(self, clips: Sequence[Clip], ask: Ask, tally: _Tally, partial: list[Any]) -> Any:
        import tenacity

        jitter = tenacity.wait_random_exponential(multiplier=self.oracle.backoff, max=self.oracle.max_backoff)

        def wait(retry_state: Any) -> float:
            return max(retry_state.outcome.exception().wait, jitter(retry_state))

        failed: list[Fault] = []
        retrying = tenacity.AsyncRetrying(
            stop=lambda _: len(failed) >= self.oracle.max_attempts,
            wait=wait,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Fault) and error.retry),
            reraise=True,
        )
        content = [*self._images(clips), {"type": "text", "text": ask.text}]
        messages = [{"role": "system", "content": ask.system}, {"role": "user", "content": content}]
        fields = {
            "model": self.oracle.model,
            "messages": messages,
            "temperature": self.oracle.temperature,
            "max_tokens": self.oracle.max_tokens,
            **self._format(ask),
            **self.oracle.extra_body,
        }
        body = {name: value for name, value in fields.items() if value is not None}
        async for attempt in retrying:
            with attempt:
                self.counts["retries"] += attempt.retry_state.attempt_number > 1
                served = self.served
                try:
                    return await self._attempt(ask, body, tally)
                except Fault as fault:
                    partial += [] if fault.partial is None else [fault.partial]
                    # As long as other requests get through, a rate limit only means waiting in the queue.
                    if fault.kind != "rate_limit" or self.served == served:
                        failed.append(fault)
                    raise
        raise AssertionError("a retry loop ends by a result or an exception")

    async def _attempt(self, ask: Ask, body: dict[str, Any], tally: _Tally) -> Any:
        try:
            async with self.slots:
                await self._let_pass()
                client = self.free.pop() if self.free else await self.connect()
                start = time.perf_counter()
                self.counts["requests"] += 1
                try:
                    completion = await self._post(client, body, tally)
                finally:
                    tally.seconds += time.perf_counter() - start
                    self.free.append(client)
            tally.raw.append(cut_middle(self._redact(completion.content), MAX_RAW_CHARS))
            try:
                return ask.parse(completion.content)
            except MalformedVerdict as error:
                cut = "; the reply was cut: raise the option 'max_tokens'" if completion.cut else ""
                raise Fault(error.kind, f"{error}{cut}", partial=error.partial) from None
        except Fault as fault:
            self._note(fault, tally)
            raise

    async def _let_pass(self) -> None:
        """Wait out a rate limit that another request has hit."""
        now = asyncio.get_running_loop().time
        while (left := self.resume - now()) > 0:
            await asyncio.sleep(left)

    def _note(self, fault: Fault, tally: _Tally) -> None:
        self.counts[f"fault_{fault.kind}"] += 1
        fault.args = (self._redact(str(fault)),)
        tally.fault = fault

    async def _post(self, client: Any, body: dict[str, Any], tally: _Tally) -> Completion:
        """Send one request and count its cost."""
        response = await post(client, f"{self.oracle.base_url}/chat/completions", body, self.oracle.timeout)
        if response.status != 200:
            fault = status_fault(response, self._redact)
            if fault.kind == "rate_limit":
                # A rate limit applies to the key, so all requests wait; but one odd reply must not stop them for long.
                left = min(fault.wait, self.oracle.max_backoff)
                self.resume = max(self.resume, asyncio.get_running_loop().time() + left)
            raise fault
        self.served += 1
        for kind, tokens in read_usage(response).items():
            self.counts[kind] += tokens
            tally.tokens += tokens
        return read_completion(response, self._redact)

    def _format(self, ask: Ask) -> dict[str, Any]:
        if self.oracle.response_format == "none":
            return {}
        if self.oracle.response_format == "json_object":
            return {"response_format": {"type": "json_object"}}
        schema = {"name": "verdict", "strict": True, "schema": ask.schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def _images(self, clips: Sequence[Clip]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, clip in enumerate(clips, 1):
            if clip.key not in self.images:
                self.images[clip.key] = encode_frames(
                    clip, self.oracle.frames_per_clip, self.oracle.image_size
                )
            what = "Picture" if clip.is_image else "Video"
            parts += [{"type": "text", "text": f"{what} {number}:"}, *self.images[clip.key]]
        return parts

    def _redact(self, text: str) -> str:
        """`text` without the key, without anything that looks like one (servers echo keys in part), and writable."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to any log
        if self.key:
            text = text.replace(self.key, "[key]")
        return _KEY_LIKE.sub("[key]", text)


def _run_in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, from plain code or from inside a running event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def tracked() -> T:
        task = asyncio.current_task()
        assert task is not None
        begun.append((asyncio.get_running_loop(), task))
        return await work

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
        try:
            return pool.submit(asyncio.run, tracked()).result()
        except KeyboardInterrupt:  # else the thread would keep asking, and we would wait for it
            for loop, task in begun:
                loop.call_soon_threadsafe(task.cancel)
            raise
