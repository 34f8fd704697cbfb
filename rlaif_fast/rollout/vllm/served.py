"""vLLM in other processes: running `vllm serve` servers, on this machine or on others that see the weights' folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import Answer, EngineLost
from rlaif_fast.rollout.vllm.engine import WORKER, agreeing
from rlaif_fast.rollout.vllm.wire import MalformedAnswer, generate_body, read_answers
from rlaif_fast.rollout.vllm.worker import describe

T = TypeVar("T")

REQUESTS_AT_ONCE = 64  # per server, which draws for all of them together
MAX_REPLY_BYTES = 1 << 28
NEEDED = {
    "/collective_rpc": "start it with VLLM_SERVER_DEV_MODE=1",
    "/inference/v1/generate": "start it with --enable-scale-out",
}


class Server:
    """One server.

    Args:
        url: Its address.
        timeout: Seconds that it may be silent.

    Raises:
        UsageError: The address is malformed.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UsageError(
                f"sampler_options: urls: expected an address such as http://localhost:8000, got {url!r}"
            )
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._open: set[HTTPConnection] = set()
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )

    def post(self, path: str, body: bytes = b"{}") -> Any:
        """The JSON that the server answers to a request; None for an empty reply.

        Raises:
            EngineLost: There is no answer, or its status is not 200.
        """
        connection = self._connect(*self._address, timeout=self._timeout)
        self._open.add(connection)
        try:
            connection.request("POST", self._path + path, body, self._headers)
            reply = connection.getresponse()
            text = reply.read(MAX_REPLY_BYTES + 1)
        except (OSError, HTTPException) as error:
            raise self.lost(f"does not answer ({type(error).__name__}: {error})") from error
        finally:
            self._open.discard(connection)
            connection.close()
        if reply.status != 200:
            hint = f"; {NEEDED[path]}" if reply.status == 404 and path in NEEDED else ""
            raise self.lost(f"refused {path} with status {reply.status}: {_message(text)}{hint}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise self.lost(f"answered {path} with what is not JSON: {_message(text)}") from None

    def call(self, method: str, *args: str) -> list[Any]:
        """What each worker of the server returns."""
        reply = self.post("/collective_rpc", json.dumps({"method": method, "args": args}).encode())
        results = reply.get("results") if isinstance(reply, dict) else None
        if not isinstance(results, list) or not results:
            raise self.lost("answered /collective_rpc without results")
        return results

    def describe(self) -> list[dict[str, Any]]:
        """See `WeightUpdates.rlaif_fast_describe`."""
        found = self.call("rlaif_fast_describe")
        if not all(isinstance(worker, dict) for worker in found):
            raise self.lost("answered rlaif_fast_describe with something else")
        return found

    def hang_up(self) -> None:
        """Abort the requests in progress; the server drops them."""
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):  # it is ending by itself
                connection.sock.shutdown(SHUT_RDWR)

    def lost(self, what: str) -> EngineLost:
        """The error that names this server."""
        return EngineLost(f"sampler: the vLLM server {self.url} {what}")


class ServedEngine:
    """Draws by servers that were started with the policy's model; see docs/engines.md for how.

    Each server gets an equal run of adjacent prompts, so that questions about one video share its features there.

    Args:
        policy: Whose model they run.
        urls: Their addresses.
        timeout: Seconds that a server may be silent.

    Raises:
        UsageError: A server runs another model, or with settings that do not fit.
        EngineLost: A server does not answer.
    """

    def __init__(self, policy: Policy, urls: Sequence[str], timeout: float) -> None:
        self._config = unwrap(policy.model).config
        self._servers = [Server(url, timeout) for url in urls]
        wanted = describe(self._config) | agreeing(policy)
        found = [worker for server in self._servers for worker in _checked(server, wanted)]
        self.max_model_len = min(worker["max_model_len"] for worker in found)
        self._weights: str | None = None
        self._loads = 0

    def generate(
        self, prompts: Sequence[EncodedPrompt], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[list[Answer]]:
        """See `Engine`.

        Raises:
            EngineLost: A server is gone, has other weights than it was given, or answers something else.
        """
        self._on_all(self._check_weights)
        bounds = [len(prompts) * i // len(self._servers) for i in range(len(self._servers) + 1)]
        asked = [
            (server, i)
            for server, low, high in zip(self._servers, bounds, bounds[1:])
            for i in range(low, high)
        ]

        def answers(request: tuple[Server, int]) -> list[Answer]:
            server, i = request
            # Made here: a body holds its clip's patches, hundreds of megabytes.
            body = generate_body(prompts[i], self._config, options, seeds[i])
            try:
                return read_answers(server.post("/inference/v1/generate", body), options["n"])
            except MalformedAnswer as error:
                raise server.lost(f"gave {error}") from None

        return _at_once(answers, asked, REQUESTS_AT_ONCE * len(self._servers))

    def load_weights(self, folder: Path) -> None:
        """See `Engine`."""
        self._loads += 1
        self._weights = name = f"{folder}:{self._loads}"

        def load(server: Server) -> None:
            server.call("rlaif_fast_load", str(folder), name)
            # Keys, values and features of the old weights.
            reply = server.post("/reset_prefix_cache")
            if not isinstance(reply, dict) or reply.get("success") is not True:
                raise server.lost("did not reset its prefix cache; is something else drawing there?")
            server.post("/reset_encoder_cache")

        self._on_all(load)

    def close(self) -> None:
        """Send no more requests; the servers keep running."""
        for server in self._servers:
            server.hang_up()

    def _check_weights(self, server: Server) -> None:
        """Raise where a server was restarted or serves another run too: it would draw with other weights."""
        if any(worker.get("weights") != self._weights for worker in server.describe()):
            raise server.lost(
                "has other weights than it was given: it was started anew, or serves another run"
            )

    def _on_all(self, what: Callable[[Server], None]) -> None:
        _at_once(what, self._servers, len(self._servers))


def share_of(urls: Sequence[str]) -> list[str]:
    """The servers of this process, which alone loads weights and resets caches there.

    Raises:
        UsageError: There are fewer servers than processes.
    """
    if isinstance(urls, str) or not all(isinstance(url, str) for url in urls):
        raise UsageError(f"sampler_options: urls: expected a list of addresses, got {urls!r}")
    together = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    if len(set(urls)) < max(size, len(urls)):
        raise UsageError(
            f"sampler_options: urls: expected {max(size, len(urls))} different servers for {size} processes, got "
            f"{', '.join(urls)}"
        )
    return list(urls[rank::size])


def _checked(server: Server, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        workers = server.describe()
    except EngineLost as error:
        if "has no attribute" in str(error):
            raise server.lost(
                f"has no methods of ours; start it with --worker-extension-cls {WORKER}"
            ) from None
        raise
    for worker in workers:
        for name, value in wanted.items():
            if worker.get(name) != value:
                raise UsageError(
                    f"sampler: the vLLM server {server.url} has {name} {worker.get(name)!r}, and the policy needs "
                    f"{value!r}"
                )
    return workers


def _at_once(function: Callable[[Any], T], items: Sequence[Any], workers: int) -> list[T]:
    """The results in order; after an error no more calls start."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return [future.result() for future in [pool.submit(function, item) for item in items]]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _message(text: bytes) -> str:
    """What a reply says, in one short line."""
    words = text[:4000].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        words = str(json.loads(text)["error"]["message"])
    return " ".join(words.split())[:300]
