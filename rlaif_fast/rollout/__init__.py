"""Samplers: how responses are drawn from the policy."""

from rlaif_fast.errors import UsageError
from rlaif_fast.plugins import find
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.base import Rollout, Sampler, SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

__all__ = [
    "SAMPLERS",
    "GraphSampler",
    "PlainSampler",
    "Rollout",
    "Sampler",
    "SamplingParams",
    "SharedPrefixSampler",
    "make_sampler",
]


# Name -> a callable that takes the policy. Other packages add theirs by the entry-point group `rlaif_fast.samplers`.
SAMPLERS = {"shared_prefix": SharedPrefixSampler, "cuda_graphs": GraphSampler, "plain": PlainSampler}


def make_sampler(policy: Policy, name: str = "auto") -> Sampler:
    """Make a sampler by its name; "auto" is shared_prefix where the policy has that switched on, else plain.

    Raises:
        UsageError: There is none of that name, or it does not fit the policy.
    """
    if name == "auto":
        name = "shared_prefix" if policy.shared_prefix else "plain"
    if name in ("shared_prefix", "cuda_graphs") and not policy.shared_prefix:
        raise UsageError(f"sampler: {name} needs shared_prefix: true")
    if name == "cuda_graphs" and policy.device.type != "cuda":
        raise UsageError(f"sampler: cuda_graphs needs a model on a GPU, this one is on {policy.device}")
    return find("samplers", name, SAMPLERS, also=["auto"])(policy)
