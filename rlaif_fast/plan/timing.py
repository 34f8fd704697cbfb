"""Seconds of a step by part, from its computation and traffic, at assumed shares of the data sheet's figures.

matrix products     flops / (MATMUL peak)
a decode step       the larger of that and (weights + keys and values) / (MEMORY bandwidth)
the optimizer       28 bytes per trained weight (weight, gradient, two moments, read and written) / bandwidth
exchanges           bytes / (LINK of the slowest link on their way)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlaif_fast.plan.options import GPUS, NETWORK, PlanConfig
from rlaif_fast.plan.step import Step
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt

MATMUL, MEMORY, LINK = 0.4, 0.7, 0.7  # shares reached; assumed, not measured
OPTIMIZER_BYTES = 28


def seconds_of(
    policy: Policy, config: PlanConfig, step: Step, prompts: Sequence[EncodedPrompt]
) -> dict[str, float]:
    """Predicted seconds of a step by part.

    Args:
        policy: The policy, on the meta device.
        config: The run's configuration.
        step: What one process computes.
        prompts: The prompts that it rolls out.
    """
    gpu = GPUS[config.gpu]
    rate = MATMUL * gpu.tflops * 1e12
    bandwidth = MEMORY * gpu.bandwidth * 1e9
    parts = {name: flops / rate for name, flops in step.flops.items()}
    decoder = sum(p.numel() for p in policy.decoder.parameters()) + policy.head_weight.numel()
    if step.cache:
        turns = -(-len(prompts) // step.at_once)
        responses = len(prompts) * config.num_generations
        read = decoder * policy.head_weight.element_size() + step.cache
        computed = 2 * decoder * responses / turns
        parts["decode"] = turns * config.max_completion_length * max(read / bandwidth, computed / rate)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    updates = config.num_iterations * config.steps_per_generation
    parts["optimizer"] = updates * OPTIMIZER_BYTES * trained / config.together / bandwidth
    if config.gpus > 1:
        parts["exchanges"] = _exchanged(policy, config, step.passes, updates, trained)
    return parts


def _exchanged(policy: Policy, config: PlanConfig, passes: int, updates: int, trained: int) -> float:
    inside = LINK * GPUS[config.gpu].link * 1e9
    machines = -(-config.gpus // config.gpus_a_machine)
    together = config.together
    if together == 1:
        link = inside if machines == 1 else LINK * NETWORK * 1e9
        return updates * 2 * 4 * trained / link  # a ring sends each byte twice
    spanning = together > config.gpus_a_machine
    link = LINK * NETWORK * 1e9 if spanning else inside
    share = (together - 1) / together
    whole = sum(p.numel() for p in policy.model.parameters()) * _width(policy)
    gathered = whole * (1 + 2 * passes * updates)  # for the rollout, and forward and backward of each pass
    seconds = share * (gathered + 4 * trained * passes * updates) / link
    if config.gpus > together:
        seconds += updates * 2 * 4 * trained / together / (LINK * NETWORK * 1e9)
    return seconds


def _width(policy: Policy) -> int:
    return torch.finfo(policy.head_weight.dtype).bits // 8
