"""Samplers: how responses are drawn from the policy."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from rlaif_fast.errors import UsageError
from rlaif_fast.plugins import find
from rlaif_fast.policy.policy import Policy
from rlaif_fast.rollout.base import Rollout, Sampler, SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler, check_graphs
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler
from rlaif_fast.rollout.vllm.sampler import VllmSampler

log = logging.getLogger(__name__)

__all__ = [
    "SAMPLERS",
    "GraphSampler",
    "PlainSampler",
    "Rollout",
    "Sampler",
    "SamplingParams",
    "SharedPrefixSampler",
    "VllmSampler",
    "make_sampler",
]


# Name -> a callable that takes the policy, and options where it has any. Other packages add theirs by the entry-point
# group `rlaif_fast.samplers`.
READS_POLICY = {"shared_prefix": SharedPrefixSampler, "cuda_graphs": GraphSampler, "plain": PlainSampler}
SAMPLERS = {**READS_POLICY, "vllm": VllmSampler}


def _chosen(policy: Policy) -> str:
    """The sampler that "auto" stands for; on a GPU a line of the log says why it is the captured one or not."""
    if not policy.shared_prefix:
        return "plain"
    if policy.device.type != "cuda" or policy.shards is not None:
        return "shared_prefix"
    start = time.perf_counter()
    reason = check_graphs(policy)
    seconds = time.perf_counter() - start
    outcome = "equal eager ones" if reason is None else f"are not used: {reason}"
    log.info("rollout: captured decode steps %s (checked in %.0f ms)", outcome, 1000 * seconds)
    return "cuda_graphs" if reason is None else "shared_prefix"


def make_sampler(policy: Policy, name: str = "auto", options: Mapping[str, Any] | None = None) -> Sampler:
    """Make a sampler by its name.

    "auto" is plain where the policy has shared_prefix switched off; else cuda_graphs on a GPU where a captured step
    equals an eager one there (`check_graphs`), and shared_prefix elsewhere. Sharded weights move with each gathering: a
    captured step could not read them.

    Args:
        policy: Whose responses it draws.
        name: Its name.
        options: Its keyword arguments.

    Raises:
        UsageError: There is none of that name, it has no options, or it does not fit the policy.
    """
    if name == "auto":
        name = _chosen(policy)
    if name in ("shared_prefix", "cuda_graphs") and not policy.shared_prefix:
        raise UsageError(f"sampler: {name} needs shared_prefix: true")
    if name == "cuda_graphs" and policy.shards is not None:
        raise UsageError("sampler: cuda_graphs needs sharding: none; use auto or shared_prefix")
    if name == "cuda_graphs" and policy.device.type != "cuda":
        raise UsageError(f"sampler: cuda_graphs needs a model on a GPU, this one is on {policy.device}")
    if name in READS_POLICY and options:
        raise UsageError(f"sampler_options: the sampler {name} has none, got {', '.join(options)}")
    return find("samplers", name, SAMPLERS, also=["auto"])(policy, **(options or {}))
