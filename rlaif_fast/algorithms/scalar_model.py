"""One number per state of a response, from the policy's own modules with other weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rlaif_fast.algorithms.group import Group
from rlaif_fast.policy.features import MediaFeatures, VisionEncoder
from rlaif_fast.policy.forward_rows import for_policy, response_hidden, response_rows
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.reference import exchanged
from rlaif_fast.prompts.batches import cut_by_tokens

Responses = Sequence[Sequence[Sequence[int]]]  # of each prompt, as tokens


class ScalarModel(nn.Module):
    """A backbone and a one-vector head; the backbone is the policy's, with its trained weights swapped for these.

    It keeps the vector and float32 copies of the weights that the policy trains (with LoRA, only the adapters). While
    it works they replace the policy's, so no second model is held and all of the policy's fast paths serve it. It runs
    without dropout.

    Args:
        policy: Gives the modules and the initial weights.
        like: Start with the weights and head of this model instead; with None the head starts as zeros.
    """

    weights: nn.ParameterList
    head: nn.Parameter  # (H,)

    def __init__(self, policy: Policy, like: ScalarModel | None = None) -> None:
        super().__init__()
        self._policy = policy
        self._trained = [p for p in policy.model.parameters() if p.requires_grad]
        begin = self._trained if like is None else like.weights
        self.weights = nn.ParameterList([nn.Parameter(w.detach().float().clone()) for w in begin])
        zeros = torch.zeros(policy.head_weight.shape[1], device=policy.device)
        self.head = nn.Parameter(zeros if like is None else like.head.detach().clone())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put these weights into the policy's modules for the duration of the block."""
        pairs = [(p, w.detach().to(p.dtype)) for p, w in zip(self._trained, self.weights)]
        with self._policy.evaluating(), exchanged(pairs):
            yield

    def forward(self, prompts: Sequence[EncodedPrompt], responses: Responses) -> Tensor:
        """(M,) float32, the number of the state that each response token was drawn in; call it inside `in_place`."""
        rows = for_policy(response_rows(prompts, responses), self._policy)
        hidden = response_hidden(self._policy, rows, features=self._features(prompts))
        return hidden.float() @ self.head

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the `grad` of these weights and of the head; call it inside `in_place`."""
        own = [*self.weights, self.head]
        gradients = torch.autograd.grad(loss, [*self._trained, self.head], allow_unused=True)
        for parameter, gradient in zip(own, gradients):
            if gradient is not None:
                wide = gradient.float()
                parameter.grad = wide if parameter.grad is None else parameter.grad.add_(wide)

    def _features(self, prompts: Sequence[EncodedPrompt]) -> MediaFeatures | None:
        """The vision tower's features with the present weights."""
        policy = self._policy
        if policy.shared_prefix and policy.vision.trains:
            return VisionEncoder(policy.vision.tower, 0, policy.vision.family)(prompts)
        return policy.encode_media(prompts)


def parts_of(groups: Sequence[Group], max_tokens: int) -> list[slice]:
    """Slices of consecutive groups with at most `max_tokens` each, one per pass."""
    prompts = [group.prompt for group in groups]
    return cut_by_tokens(prompts, [group.tokens for group in groups], max_tokens)
