"""What a process holds from step to step: weights, their float32 copies, moments, the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from rlaif_fast.algorithms.registry import make_algorithm
from rlaif_fast.policy.policy import Policy
from rlaif_fast.trainer.options import TrainConfig

MOMENTS = 8  # of AdamW in float32, per trained weight


def held_parts(policy: Policy, config: TrainConfig, together: int) -> dict[str, int]:
    """Bytes by part that are held in every step.

    Args:
        policy: The policy, on the meta device.
        config: The run's configuration.
        together: Processes that hold the weights together; 1 without sharding.
    """
    parameters = list(policy.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    algorithm = make_algorithm(config)
    asks_reference = "reference" in algorithm.extra_models or algorithm.samples_from == "start"
    width = 4 if together > 1 else next(iter(trained)).element_size()
    parts = {
        "weights": weight_bytes(policy, together),
        "moments": numbers * MOMENTS // together,
    }
    if together == 1 and any(p.dtype == torch.bfloat16 for p in trained):
        parts["float32 copies"] = 4 * numbers
    if asks_reference and not policy.has_adapter:
        parts["reference"] = numbers * width // together
    if not policy.vision.trains and config.feature_cache_bytes:
        parts["remembered features (at most)"] = config.feature_cache_bytes
    return parts


def weight_bytes(policy: Policy, together: int) -> int:
    """Bytes of the weights that a process holds: its part, in float32 if they train, and a frozen tower whole."""
    whole = set() if policy.vision.trains else set(policy.vision.tower.parameters())
    total = 0
    for parameter in policy.model.parameters():
        sharded = together > 1 and parameter not in whole
        width = 4 if together > 1 and parameter.requires_grad else parameter.element_size()
        total += -(-parameter.numel() // together) * width if sharded else parameter.numel() * width
    return total


def gathered_bytes(policy: Policy, together: int) -> tuple[int, int]:
    """Bytes of sharded weights that a process gathers: all in a rollout; two layers and the rest in a pass."""
    if together == 1:
        return 0, 0
    stacks = [list(cast(nn.ModuleList, policy.decoder.layers))]
    if policy.vision.trains:
        stacks.append(policy.vision.family.tower_layers(policy.model))
        everything = _bytes(policy.model.parameters())
    else:
        everything = _bytes(policy.model.parameters()) - _bytes(policy.vision.tower.parameters())
    layers = [_bytes(layer.parameters()) for stack in stacks for layer in stack]
    return everything, 2 * max(layers) + everything - sum(layers)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.nbytes for p in parameters)
