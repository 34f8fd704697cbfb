"""Samplers: how responses are drawn from the policy."""

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.base import Rollout, Sampler, SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

__all__ = [
    "GraphSampler",
    "PlainSampler",
    "Rollout",
    "Sampler",
    "SamplingParams",
    "SharedPrefixSampler",
    "make_sampler",
]


def make_sampler(policy: Policy, *, cuda_graphs: bool = False) -> Sampler:
    """The sampler that fits the policy: shared-prefix where it has that switched on, else the plain one.

    Raises:
        UsageError: `cuda_graphs` without a GPU, or without a shared prefix.
    """
    if cuda_graphs:
        if policy.device.type != "cuda" or not policy.shared_prefix:
            raise UsageError("cuda_graphs: needs a model on a GPU and shared_prefix; set it to false")
        return GraphSampler(policy)
    return SharedPrefixSampler(policy) if policy.shared_prefix else PlainSampler(policy)
