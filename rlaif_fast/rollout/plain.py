"""The plain rollout: `generate(num_return_sequences=G)`, every response after its own copy of the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.policy.families import find_family, unwrap
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.plain import model_inputs
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import ReadsPolicy, Rollout, SamplingParams
from rlaif_fast.rollout.generate import TokenSampler, check_params, make_rollout, uniforms
from rlaif_fast.rollout.labels import Label, LabelSampler, token_sampler


class PlainSampler(ReadsPolicy):
    """Draws responses through the model's own `generate`; the fallback of `shared_prefix: false`, and the baseline."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        features: MediaFeatures | None = None,
        labels: Sequence[Sequence[Label]] | None = None,
    ) -> Rollout:
        """Return one rollout; see `SharedPrefixSampler.sample`.

        `generate` runs the vision tower itself, whatever `features` hold.
        """
        from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

        check_params(params, num_generations, prompts)
        policy = self.policy
        assert labels is None or num_generations == 1
        uniform = uniforms(len(prompts) * num_generations, params)
        draw = _Draw(policy, token_sampler(policy, params, len(uniform), labels), uniform)
        family = find_family(unwrap(policy.model).config.model_type)
        # Where `generate` would repeat media wrongly for several responses, each response gets a prompt of its own.
        expands = family is not None and family.expands
        rows = prompts if expands else [prompt for prompt in prompts for _ in range(num_generations)]
        inputs: dict[str, Any] = dict(model_inputs(policy.model, rows, padding_side="left"))
        if family is not None and family.misleads_caches(unwrap(policy.model).config):
            inputs["past_key_values"] = DynamicCache()  # of all tokens; what a layer sees is up to its mask
        # The checkpoint's own settings (a repetition penalty, say) would change what is drawn.
        settings = GenerationConfig(
            num_return_sequences=num_generations if expands else 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(policy.eos_token_ids),
            pad_token_id=policy.pad_token_id,
        )
        with policy.evaluating(), _generation_config(unwrap(policy.model), settings):
            sequences = unwrap(policy.model).generate(
                **inputs,
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=False,  # sharded weights are whole here, and processes may draw for themselves
            )
        tokens = sequences[:, inputs["input_ids"].shape[1] :].numpy(force=True)
        logps = torch.stack(draw.logps, dim=1).numpy(force=True)
        ended = np.isin(tokens, policy.eos_token_ids)
        finished = np.asarray(ended.any(axis=1))
        lengths = np.where(finished, ended.argmax(1) + 1, tokens.shape[1])
        forced = draw.sampler.forced
        return make_rollout(policy, prompts, num_generations, tokens, logps, lengths, finished, forced)


@contextlib.contextmanager
def _generation_config(model: Any, settings: Any) -> Iterator[None]:
    """Make `settings` the defaults of `generate`, in place of the model's own."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


class _Draw:
    """A logits processor that draws the tokens itself: it leaves `generate` only the drawn token."""

    def __init__(self, policy: Policy, sampler: TokenSampler | LabelSampler, uniform: Tensor) -> None:
        self._policy = policy
        self.sampler = sampler
        self._uniform = uniform.to(policy.device)
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logps)
        logits = scores.float() + self._policy.forbidden_bias
        tokens, logps = self.sampler(logits, None, self._uniform[:, step], step)
        self.logps.append(logps)
        return torch.full_like(scores, float("-inf")).scatter_(-1, tokens[:, None], 0.0)
