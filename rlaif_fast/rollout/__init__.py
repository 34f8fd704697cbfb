"""Samplers: how responses are drawn from the policy."""

from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.base import Rollout, Sampler, SamplingParams
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

__all__ = ["PlainSampler", "Rollout", "Sampler", "SamplingParams", "SharedPrefixSampler", "make_sampler"]


def make_sampler(policy: Policy) -> Sampler:
    """The sampler that fits the policy: shared-prefix where it has that switched on, else the plain one."""
    return SharedPrefixSampler(policy) if policy.shared_prefix else PlainSampler(policy)
