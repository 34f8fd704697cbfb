"""What a rollout is, and the sampler protocol."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from rlaif_fast.errors import Outage
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt

P = TypeVar("P", bound=EncodedPrompt)


class EngineLost(Outage):
    """An engine outside this process does not answer, or answers what was not asked; the policy is as it was."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn; the names are those of `transformers.GenerationConfig`.

    Attributes:
        max_new_tokens: Most tokens a response may have, the end-of-sequence token counted.
        temperature: Softmax temperature; 0 is greedy.
        top_p: Nucleus mass kept, in (0, 1]; 1 keeps all.
        top_k: Tokens kept; 0 keeps all.
        min_new_tokens: The end-of-sequence token cannot be drawn before this many tokens.
        seed: Seed of the sampler's own generator; None draws from torch's.
        max_reasoning_tokens: After this many tokens without `</think>` it is inserted (see `reasoning`); None sets no
            bound.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_new_tokens: int = 1
    seed: int | None = None
    max_reasoning_tokens: int | None = None


@dataclass(frozen=True)
class Rollout:
    """G responses for each of N prompts; B = N * G rows, the rows of a prompt adjacent.

    Attributes:
        prompts: The N prompts.
        num_generations: G.
        token_ids: (B, T) int64; the end-of-sequence token, where drawn, is the last of a row; padding follows it.
        mask: (B, T) bool, true on sampled tokens.
        logps: (B, T) float32 log-probability of each sampled token under the policy at the sampling
            temperature, before top-k and top-p; 0 under the mask.
        texts: B decoded responses, special tokens removed but for those of reasoning.
        finished: (B,) bool, whether the row drew its end-of-sequence token within the budget.
        sampling_ratio: (B, T) float32 probability of each token under the policy over that under the sampler, from a
            sampler whose probabilities are not quite the policy's; the loss is weighed by it. None where they are.
        forced: (B, T) bool, true on tokens of `mask` that were inserted, not drawn; the loss leaves them out. None
            where there are none.
    """

    prompts: tuple[EncodedPrompt, ...]
    num_generations: int
    token_ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool
    logps: Tensor  # (B, T) float32
    texts: tuple[str, ...]
    finished: Tensor  # (B,) bool
    sampling_ratio: Tensor | None = None  # (B, T) float32
    forced: Tensor | None = None  # (B, T) bool


def concat_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of different prompts as one; responses are padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.token_ids.shape[1] for part in parts)

    def padded(name: str) -> Tensor:
        rows = [getattr(part, name) for part in parts]
        return torch.cat([functional.pad(row, (0, longest - row.shape[1])) for row in rows])

    return Rollout(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        num_generations=parts[0].num_generations,
        token_ids=padded("token_ids"),
        mask=padded("mask"),
        logps=padded("logps"),
        texts=tuple(text for part in parts for text in part.texts),
        finished=torch.cat([part.finished for part in parts]),
        sampling_ratio=None if parts[0].sampling_ratio is None else padded("sampling_ratio"),
        forced=None if parts[0].forced is None else padded("forced"),
    )


@runtime_checkable
class Sampler(Protocol):
    """Draws `num_generations` responses for each prompt."""

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        num_generations: int,
        params: SamplingParams,
        features: MediaFeatures | None = None,
    ) -> Rollout:
        """Return one rollout; the policy's weights are read, never changed.

        Args:
            prompts: N prompts.
            num_generations: G.
            params: How to draw.
            features: What the policy's vision tower gave for these prompts, for a sampler that can use it in place of
                a pass of its own; the responses are the same with and without.
        """
        ...

    def sync_weights(self, policy: Policy) -> None:
        """Copy the policy's weights; called before responses are drawn from a policy that has changed."""
        ...

    @property
    def draws_elsewhere(self) -> bool:
        """Whether other processes draw, with their own weights, so that this one is free meanwhile.

        Such a sampler is a `SamplerElsewhere` too.
        """
        ...


@dataclass(frozen=True)
class Answer:
    """One response of an engine: its tokens, and the log-probability that each was drawn with."""

    token_ids: Sequence[int]
    logps: Sequence[float]


@dataclass(frozen=True)
class Begun(Generic[P]):
    """A rollout in progress; `answers` has G for each of the N prompts."""

    prompts: Sequence[P]
    params: SamplingParams
    answers: Future[list[list[Answer]]]


class SamplerElsewhere(Sampler, Protocol):
    """A sampler whose `draws_elsewhere` is true: a rollout is begun, and finished when it is wanted."""

    def begin(self, prompts: Sequence[P], num_generations: int, params: SamplingParams) -> Begun[P]:
        """Start drawing from the weights that were synced last, and return at once; see `finish`.

        Args:
            prompts: N prompts.
            num_generations: G.
            params: How to draw.
        """
        ...

    def finish(self, begun: Begun[P], features: MediaFeatures | None = None) -> Rollout:
        """The rollout that was begun, scored by the policy as it is now.

        `Rollout.logps` and the ratio's numerator are of the present weights, so the ratio corrects for the updates
        since as well as for the engine.

        Args:
            begun: From `begin`.
            features: Of its prompts, by the present weights; None to encode here.

        Raises:
            EngineLost: The engine was lost meanwhile.
        """
        ...


class ReadsPolicy:
    """A sampler that computes with the policy itself, and so always with its present weights."""

    draws_elsewhere = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sync_weights(self, policy: Policy) -> None:
        """Nothing to do: the weights are shared."""
        assert policy is self.policy
