"""`sampler: vllm`: responses drawn by vLLM, their log-probabilities and ratios by the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import Answer, Begun, P, Rollout, SamplingParams
from rlaif_fast.rollout.generate import check_params, make_rollout, score
from rlaif_fast.rollout.vllm.engine import Engine, LocalEngine
from rlaif_fast.rollout.vllm.guard import TOKENS, check_agreement
from rlaif_fast.rollout.vllm.requests import check_lengths, check_model, sampling_options, seeds
from rlaif_fast.rollout.vllm.served import ServedEngine, share_of
from rlaif_fast.rollout.vllm.weights import WeightsFolder

SILENCE = 1800.0  # seconds; a rollout of long responses is one reply
GUARDED_VERSIONS = 2  # the start and the first update
GUARDED_PROMPTS = 4
GUARD_TEMPERATURE = 0.7  # not 1, so that log-probabilities before the temperature show


class VllmSampler:
    """Draws responses with vLLM.

    The policy scores what vLLM draws: `Rollout.logps` are the policy's, and `Rollout.sampling_ratio` is the mismatch of
    the two. At the start and after the first update the log-probabilities of a few tokens are compared.

    Args:
        policy: Whose responses they are.
        urls: Running `vllm serve` servers that draw; without any, vLLM runs in this process. Each of several processes
            has servers of its own.
        weights_folder: Where weights are handed over; None is shared memory where the system has it. Servers must see
            the folder.
        timeout: Seconds that a server may be silent.
        **options: Arguments of `vllm.LLM` in this process, such as `max_model_len` and `gpu_memory_utilization`.

    Raises:
        UsageError: vLLM is not installed, or an engine does not fit the policy or the run.
        EngineLost: A server does not answer.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        urls: Sequence[str] = (),
        weights_folder: str | Path | None = None,
        timeout: float = SILENCE,
        **options: Any,
    ) -> None:
        check_model(policy)
        self._options = options
        self._engine: Engine | None = None
        if urls:
            if options:
                raise UsageError(
                    f"sampler_options: {', '.join(options)}: expected at the start of the servers where there are urls"
                )
            self._engine = ServedEngine(policy, share_of(urls), timeout)
        else:
            LocalEngine.check_available()
        self._folder = WeightsFolder(weights_folder)
        self._guard: _Guard | None = None
        self._thread = ThreadPoolExecutor(1)
        self._begun: Begun | None = None
        self.policy = policy

    @property
    def draws_elsewhere(self) -> bool:
        """Whether servers draw; vLLM in this process computes on its device."""
        return isinstance(self._engine, ServedEngine)

    @property
    def version(self) -> int:
        """Version of the engine's weights: 1 at the start, one more with each update."""
        return self._folder.version

    def sync_weights(self, policy: Policy) -> None:
        """Hand over the policy's weights; nothing is written where they have not changed since the last time.

        A rollout in progress is waited for, so that it ends with the weights that it began with. Sharded weights are
        handed over while they are gathered, which scoring needs too.
        """
        assert policy is self.policy
        assert policy.shards is None or policy.shards.is_whole
        if self._begun is not None:
            wait([self._begun.answers])
        if not self._folder.write(policy):
            return
        if self._engine is None:
            self._engine = LocalEngine(policy, self._folder.path, self._options)
        else:
            self._engine.load_weights(self._folder.path)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        features: MediaFeatures | None = None,
    ) -> Rollout:
        """Return one rollout; see `Sampler`."""
        self._check(prompts, num_generations, params)
        with self.policy.evaluating():
            return self._draw(prompts, num_generations, params, features)

    @torch.no_grad()
    def begin(self, prompts: Sequence[P], num_generations: int, params: SamplingParams) -> Begun[P]:
        """Start drawing on the servers with the weights synced last, and return at once; see `SamplerElsewhere`."""
        self._check(prompts, num_generations, params)
        assert self._engine is not None
        options = sampling_options(self.policy, params, num_generations)
        answers = self._thread.submit(self._engine.generate, prompts, options, seeds(params, len(prompts)))
        self._begun = begun = Begun(prompts, params, answers)
        return begun

    @torch.no_grad()
    def finish(self, begun: Begun[P], features: MediaFeatures | None = None) -> Rollout:
        """The rollout that was begun, scored by the policy as it is now; see `SamplerElsewhere`."""
        with self.policy.evaluating():
            return rollout_of(self.policy, begun.prompts, begun.answers.result(), begun.params, features)

    def _check(self, prompts: Sequence[EncodedPrompt], num_generations: int, params: SamplingParams) -> None:
        """Refuse what cannot be drawn; check new weights where a check is due."""
        check_params(params, num_generations, prompts)
        if self.version == 0:
            self.sync_weights(self.policy)
        assert self._engine is not None
        check_lengths(prompts, params, self._engine.max_model_len)
        with self.policy.evaluating():
            if self._guard is None:
                self._guard = _Guard(prompts[:GUARDED_PROMPTS])
            self._guard.check(self)

    def _draw(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        features: MediaFeatures | None = None,
    ) -> Rollout:
        assert self._engine is not None
        options = sampling_options(self.policy, params, num_generations)
        answers = self._engine.generate(prompts, options, seeds(params, len(prompts)))
        return rollout_of(self.policy, prompts, answers, params, features)

    def close(self) -> None:
        """Give back the engine and remove the weights."""
        if self._engine is not None:
            self._engine.close()
        self._thread.shutdown()
        self._folder.close()


@torch.no_grad()
def rollout_of(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    answers: Sequence[Sequence[Answer]],
    params: SamplingParams,
    features: MediaFeatures | None = None,
) -> Rollout:
    """The rollout of an engine's answers, with the policy's own log-probabilities.

    The ratio compares the distributions that were drawn from, after top-k, top-p and min_new_tokens on both sides: cuts
    that both make are no mismatch. A greedy answer has no ratio.

    Args:
        policy: The policy whose responses they count as.
        prompts: N prompts.
        answers: For each prompt G answers.
        params: How they were drawn.
        features: From `Policy.encode_media` of the prompts; None to encode here.
    """
    rows = [answer for group in answers for answer in group]
    lengths = np.asarray([len(row.token_ids) for row in rows])
    width = int(lengths.max(initial=1))
    token_ids = np.zeros((len(rows), width), dtype=np.int64)
    theirs = np.zeros((len(rows), width), dtype=np.float32)
    for place, row in enumerate(rows):
        token_ids[place, : lengths[place]] = row.token_ids
        theirs[place, : lengths[place]] = row.logps
    ends = [bool(len(row.token_ids)) and row.token_ids[-1] in policy.eos_token_ids for row in rows]
    drawn = make_rollout(
        policy, prompts, len(answers[0]), token_ids, theirs, lengths, np.asarray(ends, dtype=bool)
    )
    before, after = score(policy, prompts, drawn.token_ids, drawn.mask, params, features)
    logps = torch.zeros_like(drawn.logps).masked_scatter(drawn.mask, before)
    ratio = None
    if params.temperature > 0:
        difference = after - drawn.logps[drawn.mask]
        ratio = torch.zeros_like(drawn.logps).masked_scatter(drawn.mask, difference.exp())
    return dataclasses.replace(drawn, logps=logps, sampling_ratio=ratio)


class _Guard:
    """Draws for the same prompts at the start and after the first update, so that stale caches of the engine show."""

    def __init__(self, prompts: Sequence[EncodedPrompt]) -> None:
        self._prompts = list(prompts)
        self._checked = 0

    def check(self, sampler: VllmSampler) -> None:
        """Compare where the sampler's weights are new, for the first versions only."""
        if self._checked == sampler.version or self._checked >= GUARDED_VERSIONS:
            return
        tokens = TOKENS // len(self._prompts)
        params = SamplingParams(tokens, temperature=GUARD_TEMPERATURE, min_new_tokens=0, seed=0)
        drawn = sampler._draw(self._prompts, 1, params)
        assert drawn.sampling_ratio is not None
        ours = drawn.logps[drawn.mask]
        theirs = ours - drawn.sampling_ratio[drawn.mask].log()
        check_agreement(ours, theirs, sampler.policy.head_weight.dtype, sampler.version)
        self._checked = sampler.version
