"""vLLM in this process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import Answer
from rlaif_fast.rollout.vllm.folder import write_model_files
from rlaif_fast.rollout.vllm.requests import MediaItem, by_modality, media_items
from rlaif_fast.streams import capturing

WORKER = "rlaif_fast.rollout.vllm.worker.WeightUpdates"
LONGEST = 32768  # tokens of prompt and response, where the model takes more
CPU_CACHE_BYTES = 1 << 29
# Read when vLLM is imported. Its engine stays in this process, so that weights and prompts need no socket.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Engine(Protocol):
    """Answers requests with weights that it loads from a folder."""

    max_model_len: int

    def generate(
        self, prompts: Sequence[EncodedPrompt], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[list[Answer]]:
        """The answers to each prompt.

        Args:
            prompts: N prompts.
            options: Arguments of `vllm.SamplingParams` for all of them.
            seeds: (N,) one a prompt.
        """
        ...

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a folder and forget what was computed with the old ones."""
        ...

    def close(self) -> None:
        """Release its resources."""
        ...


class LocalEngine:
    """vLLM's offline engine.

    Args:
        policy: Whose model it runs; weights come by `load_weights`.
        folder: Where weights are written; it already holds the first ones.
        options: Arguments of `vllm.LLM` in place of ours.

    Raises:
        UsageError: vLLM takes no such option.
    """

    def __init__(self, policy: Policy, folder: Path, options: dict[str, Any]) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self._config = unwrap(policy.model).config
        settings = defaults(policy) | options
        write_model_files(policy, folder, settings["max_model_len"])
        # vLLM seeds torch's generator, and captures its graphs, while another thread may prefetch frames
        with torch.random.fork_rng(), capturing():
            try:
                self._llm = LLM(model=str(folder), **settings)
            except TypeError as error:
                raise UsageError(f"sampler_options: {error}") from error
        self.max_model_len = self._llm.llm_engine.model_config.max_model_len
        self._asked = 0

    @staticmethod
    def check_available() -> None:
        """Refuse where vLLM cannot run, before anything is trained.

        Raises:
            UsageError: vLLM is not installed, or the run has several processes.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "sampler: vllm needs vLLM, which is not installed here; docs/engines.md says how"
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UsageError("sampler: vllm draws in the only process of a run; set num_processes to 1")

    def generate(
        self, prompts: Sequence[EncodedPrompt], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[list[Answer]]:
        """See `Engine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        places = {}
        for place, (prompt, seed) in enumerate(zip(prompts, seeds)):
            params = SamplingParams(**options, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY)
            request_id = str(self._asked)
            self._asked += 1
            places[request_id] = place
            engine.add_request(request_id, engine_input(prompt, self._config), params)
        answers: list[list[Answer]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    drawn = sorted(output.outputs, key=lambda completion: completion.index)
                    answers[places[output.request_id]] = [_answer(completion) for completion in drawn]
        return answers

    def load_weights(self, folder: Path) -> None:
        """See `Engine`."""
        self._llm.collective_rpc("rlaif_fast_load", args=(str(folder), folder.name))
        # Keys, values and features of the old weights; the encoder's worker and scheduler have a cache each.
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.engine_core.reset_encoder_cache()

    def close(self) -> None:
        """See `Engine`."""
        self._llm.llm_engine.engine_core.shutdown()


def agreeing(policy: Policy) -> dict[str, Any]:
    """The settings under which vLLM's log-probabilities equal the policy's; served engines must have them too."""
    return {
        "dtype": str(policy.head_weight.dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",
        "mm_device_do_normalize": False,
    }


def defaults(policy: Policy) -> dict[str, Any]:
    """The arguments of `vllm.LLM`: those that make it agree with the policy, and sizes that fit beside one."""
    config = unwrap(policy.model).config
    settings: dict[str, Any] = agreeing(policy) | {
        "max_model_len": min(config.get_text_config().max_position_embeddings, LONGEST),
        "enable_prefix_caching": True,
        "worker_extension_cls": WORKER,
        "generation_config": "vllm",
        "skip_mm_profiling": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    if policy.device.type == "cpu":
        # For a prompt in two chunks vLLM 0.32 rewinds a seeded generator, which a CPU's does not support.
        return settings | {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "block_size": 32,
            "kv_cache_memory_bytes": CPU_CACHE_BYTES,
        }
    return settings | {"gpu_memory_utilization": 0.4}


def engine_input(prompt: EncodedPrompt, config: Any) -> Any:
    """A prompt as vLLM's engine takes it after its own processor."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import PlaceholderRange

    ids = prompt.input_ids.tolist()
    items = media_items(prompt, config)
    if not items:
        return tokens_input(ids)
    return mm_input(
        ids,
        by_modality(items, kwargs_item),
        by_modality(items, lambda item: item.key),
        by_modality(items, lambda item: PlaceholderRange(offset=item.offset, length=item.length)),
    )


def kwargs_item(item: MediaItem) -> Any:
    """The tensors of a medium with what vLLM needs to know about their shapes."""
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    rows = torch.tensor([len(item.patches)])
    fields = {
        name: MultiModalFieldConfig.flat_from_sizes(item.modality, rows)
        if name.startswith("pixel_values")
        else MultiModalFieldConfig.batched(item.modality, keep_on_cpu=True)
        for name in item.fields
    }
    return MultiModalKwargsItems.from_hf_inputs(BatchFeature(item.fields), fields)[item.modality][0]


def _answer(completion: Any) -> Answer:
    tokens = list(completion.token_ids)
    return Answer(tokens, [step[token].logprob for step, token in zip(completion.logprobs, tokens)])
