"""A policy that ends its responses, and what two rollouts of equal draws have in common."""

from __future__ import annotations

import torch

from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import IDS, make_model, make_policy
from rlaif_fast.rollout.base import Rollout

EOS = IDS["<|im_end|>"]


def make_ending_policy(family: str) -> Policy:
    """A policy that ends a response now and then, and repeats itself within a group."""
    policy = make_policy(family, model=make_model(family))
    policy.forbidden_bias[EOS] += 3.0
    policy.forbidden_bias[IDS["word1"]] += 3.0
    return policy


def assert_same(ours: Rollout, plain: Rollout) -> None:
    assert torch.equal(ours.token_ids, plain.token_ids)
    assert torch.equal(ours.mask, plain.mask)
    assert torch.equal(ours.finished, plain.finished)
    assert ours.texts == plain.texts
    torch.testing.assert_close(ours.logps, plain.logps, rtol=1e-4, atol=1e-5)
