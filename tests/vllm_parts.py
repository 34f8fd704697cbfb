"""What stands in for vLLM where it is not installed: a policy in this process, and a small server before one."""

from __future__ import annotations

import base64
import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout import SharedPrefixSampler
from rlaif_fast.rollout.base import Answer, SamplingParams
from rlaif_fast.rollout.generate import score
from rlaif_fast.rollout.vllm.requests import media_items
from rlaif_fast.rollout.vllm.wire import packed_item
from rlaif_fast.rollout.vllm.worker import describe

LORA = SimpleNamespace(
    lora_r=4,
    lora_alpha=8,
    use_rslora=False,
    lora_dropout=0.0,
    lora_modules=["decoder", "tower"],
    lora_target_modules=None,
)


class PolicyEngine:
    """Draws with a copy of the policy, whose weights are those of the folder it was last told to load."""

    max_model_len = 4096

    def __init__(self, policy, folder, options) -> None:
        self.options = options
        base = copy.deepcopy(unwrap(policy.model))
        assert not any(".lora_" in name for name in base.state_dict())
        self.policy = Policy(base, policy.tokenizer)
        self.loads = 0
        self.load_weights(folder)

    @staticmethod
    def check_available() -> None:
        """It always is."""

    def load_weights(self, folder) -> None:
        weights = {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}
        own = dict(self.policy.model.named_parameters())
        assert weights.keys() == own.keys()
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        self.loads += 1

    def generate(self, prompts, options, seeds):
        params = SamplingParams(
            options["max_tokens"],
            options["temperature"],
            options["top_p"],
            options["top_k"],
            options["min_tokens"],
            seeds[0] % 2**31,
        )
        drawn = SharedPrefixSampler(self.policy).sample(prompts, options["n"], params)
        with torch.no_grad():
            _, behind = score(self.policy, prompts, drawn.token_ids, drawn.mask, params)
        lengths = drawn.mask.sum(1).tolist()
        answers = [
            Answer(ids[:n].tolist(), logps.tolist())
            for ids, n, logps in zip(drawn.token_ids, lengths, behind.split(lengths))
        ]
        return [answers[i : i + options["n"]] for i in range(0, len(answers), options["n"])]


class StandInServer(ThreadingHTTPServer):
    """Answers what `vllm serve` does, over HTTP, for prompts that it is told of.

    Attributes:
        asked: The paths and bodies of all requests.
        replies: Path -> (status, body) that it gives in place of an answer.
    """

    daemon_threads = True

    def __init__(self, policy, prompts) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.config = unwrap(policy.model).config
        self.dtype = str(policy.head_weight.dtype).removeprefix("torch.")
        self.policy = policy
        self.prompts = {tuple(prompt.input_ids.tolist()): prompt for prompt in prompts}
        self.engine = None
        self.weights = None
        self.asked: list[tuple[str, dict]] = []
        self.replies: dict[str, tuple[int, bytes]] = {}
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict):
        if path == "/collective_rpc":
            return {"results": [getattr(self, body["method"])(*body.get("args", ()))]}
        if path == "/inference/v1/generate":
            return self.generate(**body)
        return {"success": True} if path == "/reset_prefix_cache" else None

    def rlaif_fast_describe(self) -> dict:
        return describe(self.config) | {
            "dtype": self.dtype,
            "logprobs_mode": "processed_logprobs",
            "mm_device_do_normalize": False,
            "max_model_len": 4096,
            "weights": self.weights,
        }

    def rlaif_fast_load(self, folder: str, name: str) -> None:
        if self.engine is None:
            self.engine = PolicyEngine(self.policy, Path(folder), {})
        else:
            self.engine.load_weights(Path(folder))
        self.weights = name

    def generate(self, token_ids, sampling_params, features=None) -> dict:
        prompt = self.prompts[tuple(token_ids)]
        items = media_items(prompt, self.config)
        given = {} if features is None else features["kwargs_data"]
        assert [base64.b64decode(data) for data in given.get("image", [])] == [packed_item(i) for i in items]
        (answers,) = self.engine.generate([prompt], sampling_params, [sampling_params["seed"]])
        return {"choices": [choice(i, answer) for i, answer in enumerate(answers)][::-1]}


def choice(index: int, answer: Answer) -> dict:
    """An answer as vLLM writes it."""
    content = [{"token_id": t, "logprob": p, "rank": 1} for t, p in zip(answer.token_ids, answer.logps)]
    return {"index": index, "token_ids": list(answer.token_ids), "logprobs": {"content": content}}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:  # the policy answers one at a time
            self.server.asked.append((self.path, body))
            if self.path in self.server.replies:
                status, reply = self.server.replies[self.path]
            else:
                found = self.server.answer(self.path, body)
                status, reply = 200, b"" if found is None else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args) -> None:
        """Nothing."""


@contextmanager
def serving(policy, prompts):
    """A server that runs meanwhile."""
    with StandInServer(policy, prompts) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
