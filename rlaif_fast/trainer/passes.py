"""Forward and backward passes of bounded size that share one pass of the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.shard import empty_loss
from rlaif_fast.prompts.batches import cut_by_tokens
from rlaif_fast.trainer.run import Run

T = TypeVar("T")


def backward_in_parts(
    run: Run,
    prompts: Sequence[EncodedPrompt],
    tokens: Sequence[int],
    features: MediaFeatures | None,
    loss_of: Callable[[slice, MediaFeatures | None], tuple[Tensor, T]],
) -> list[T]:
    """Accumulate the gradient of the loss of all responses, with at most `max_packed_tokens` in the model at once.

    The vision tower still runs only once, forward and backward. With sharded weights every process makes as many passes
    as the one with the most, whether or not it has something left to learn.

    Args:
        run: Its policy is trained.
        prompts: N prompts.
        tokens: (N,) tokens of the responses to each.
        features: The tower's output for the prompts, perhaps with its graph; None to run the tower.
        loss_of: Returns the loss of consecutive prompts, and a value to return for them.

    Returns:
        The values of `loss_of`, in the order of the parts.
    """
    policy = run.policy
    parts = cut_by_tokens(prompts, tokens, run.config.max_packed_tokens)
    empty, fillers = 0, []
    if policy.shards is not None:
        empty = int(run.world.max(len(parts))) - len(parts)
        if empty or not any(prompt.media for prompt in prompts):
            fillers = [policy.shards.filler]
    if features is None:
        features = policy.encode_media([*prompts, *fillers])
    leaves = features.leaves() if features is not None and features.requires_grad else None
    results = []
    for part in parts:
        loss, result = policy.call(partial(loss_of, part, leaves or features))
        loss.backward()
        del loss  # and what its graph still holds
        results.append(result)
    for _ in range(empty):
        policy.call(partial(empty_loss, policy, leaves or features)).backward()
    if leaves is not None:
        assert features is not None
        if policy.shards is not None:
            for leaf in leaves.levels:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        features.backward_from(leaves)
    return results
