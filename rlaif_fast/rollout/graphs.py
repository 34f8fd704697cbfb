"""The shared-prefix rollout with decode steps of fixed shapes, captured once as a CUDA graph and replayed.

A decode step of a few hundred tokens is a thousand small launches, and on a GPU the launches are what it costs. Here
every response is fed at every step, finished or not, and every group attends to its whole buffer under a mask, so
no shape changes from step to step, nor from rollout to rollout with as many groups and a buffer of the same rounded
length. What is given up: responses that begin alike are computed separately, and finished ones go on.

Draws, and so tokens, are those of the other samplers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import Rollout, SamplingParams
from rlaif_fast.rollout.generate import Drawn, TokenSampler
from rlaif_fast.rollout.shared_prefix import GroupCache, SharedPrefixSampler

LENGTH_STEP = 256  # buffers are this much longer at a time, so that rollouts of similar prompts share a graph
WARM_UP_STEPS = 3  # before a capture, as torch asks: libraries allocate and choose kernels on first use


class FixedStep:
    """One token for each response of N groups, against the groups' buffers; the attention context of its own pass.

    Args:
        policy: The policy.
        groups: N.
        num_generations: G.
        length: L, columns of a group's buffer.
    """

    def __init__(self, policy: Policy, groups: int, num_generations: int, length: int) -> None:
        device, dtype = policy.device, policy.head_weight.dtype
        responses = groups * num_generations
        self.shape = (groups, num_generations, length)
        self.cache = GroupCache(policy, np.zeros(groups, dtype=np.int64), length)
        self._policy = policy
        self._ids = torch.zeros(responses, dtype=torch.int64, device=device)
        self._positions = torch.zeros(3, responses, dtype=torch.int64, device=device)
        self._columns = torch.zeros(responses, dtype=torch.int64, device=device)
        each = torch.arange(responses, device=device)
        self._group, self._slot = each // num_generations, each % num_generations
        # (N, heads that share a key head, G, L) additive
        self._bias = torch.zeros(
            groups, self.cache.heads_per_key, num_generations, length, dtype=dtype, device=device
        )
        self._weights = self._addresses()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None

    def fits(self, groups: int, num_generations: int, length: int) -> bool:
        """Whether a rollout of these sizes can use the step, and the weights are where they were."""
        return self.shape == (groups, num_generations, length) and self._weights == self._addresses()

    def begin(self, prompt_lengths: np.ndarray) -> None:
        """Start a rollout: each response sees its prompt alone."""
        self.cache.used = prompt_lengths.copy()
        self._begins = torch.from_numpy(prompt_lengths).to(self._ids.device)[self._group]
        visible = torch.arange(self.shape[2], device=self._ids.device) < self._begins[:, None]  # (B, L)
        bias = torch.where(visible, 0.0, float("-inf")).to(self._bias.dtype)
        groups, num_generations, length = self.shape
        self._bias.copy_(bias.view(groups, 1, num_generations, length))

    def __call__(self, tokens: Tensor, positions: Tensor, step: int) -> Tensor:
        """Feed one token (B,) to each response at positions (B,); hidden states (B, H), valid until the next call."""
        self._ids.copy_(tokens)
        self._positions.copy_(positions.expand(3, -1))
        self._columns.copy_(self._begins + step * self.shape[1] + self._slot)
        self._bias[self._group, :, self._slot, self._columns] = 0.0
        if self._graph is not None:
            with torch.cuda.device(self._ids.device):
                self._graph.replay()
        elif self._ids.is_cuda:
            self._capture()
        else:
            self._hidden = self._run()
        assert self._hidden is not None
        return self._hidden

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self._group, self._columns, key, value)
        groups, _, length = self.shape
        bias = self._bias.view(groups, 1, -1, length)
        return self.cache.attend(layer, query[0].transpose(0, 1), bias, scale)[None]

    def _run(self) -> Tensor:
        return self._policy.decode(self._ids, self._positions, self)

    def _capture(self) -> None:
        # Feeding the same tokens again writes the same keys to the same columns, so warming up changes nothing.
        device = self._ids.device
        with torch.cuda.device(device):  # streams and captures are of the current device
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Threads that prefetch frames may call CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._hidden = self._run()
            self._graph = graph
            graph.replay()

    def _addresses(self) -> tuple[int, ...]:
        return tuple(p.data_ptr() for p in self._policy.model.parameters())


class GraphSampler(SharedPrefixSampler):
    """`SharedPrefixSampler` with fixed decode steps; a CUDA graph on a GPU, the same steps uncaptured elsewhere."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._step: FixedStep | None = None

    def _make_cache(self, prompt_lengths: np.ndarray, num_generations: int, length: int) -> GroupCache:
        sizes = (len(prompt_lengths), num_generations, -(-length // LENGTH_STEP) * LENGTH_STEP)
        if self._step is None or not self._step.fits(*sizes):
            self._step = None  # its buffers are freed before the new ones are made
            self._step = FixedStep(self.policy, *sizes)
        self._step.begin(prompt_lengths)
        return self._step.cache

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        prompt_lengths: np.ndarray,
        num_generations: int,
        params: SamplingParams,
        cache: GroupCache,
        hidden: Tensor,
        uniform: Tensor,
    ) -> Rollout:
        policy, device, feed = self.policy, self.policy.device, self._step
        assert feed is not None
        responses = len(prompts) * num_generations
        group = torch.arange(responses, device=device) // num_generations
        first = [policy.layouts(prompt).next_position for prompt in prompts]
        next_position = torch.tensor(first, device=device)[group]
        draw = TokenSampler(policy, params)
        drawn = Drawn(policy, responses, params.max_new_tokens)
        for step in range(params.max_new_tokens):
            tokens, logp = draw(policy.logits(hidden), group if step == 0 else None, uniform[:, step], step)
            live = np.flatnonzero(~drawn.finished)
            drawn.record(live, step, tokens.numpy(force=True)[live], logp.numpy(force=True)[live])
            if drawn.finished.all() or step + 1 == params.max_new_tokens:
                break
            hidden = feed(tokens, next_position + step, step)
        return drawn.rollout(policy, prompts, num_generations)
