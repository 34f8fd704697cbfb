"""A plan: what a step takes, whether it fits, and what to change if it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlaif_fast.algorithms.registry import make_algorithm
from rlaif_fast.errors import UsageError
from rlaif_fast.plan.held import gathered_bytes, held_parts
from rlaif_fast.plan.model import policy_on_meta, shape_of, with_layers
from rlaif_fast.plan.options import GPUS, PlanConfig
from rlaif_fast.plan.step import Step, run_on_meta
from rlaif_fast.plan.timing import seconds_of
from rlaif_fast.plan.workload import prompts_of_a_process
from rlaif_fast.policy.loading import DTYPES
from rlaif_fast.policy.prompt import EncodedPrompt

GIB = 2**30
CONTEXT = 1.5 * GIB  # CUDA and its libraries; assumed
SHALLOW = (4, 7)  # decoder layers
FRAGMENTED = 0.05  # share of the allocated memory lost to fragmentation; assumed
GATHERED = "gathered weights"


@dataclass(frozen=True)
class Plan:
    """What a step of one process takes.

    Attributes:
        config: The run's configuration.
        rollout: Bytes by part at the peak of the rollout.
        update: Bytes by part at the peak of the update.
        seconds: Seconds by part.
        prompt_tokens: Tokens of a prompt.
        passes: Forward and backward passes of an optimizer step.
    """

    config: PlanConfig
    rollout: dict[str, int]
    update: dict[str, int]
    seconds: dict[str, float]
    prompt_tokens: int
    passes: int

    @property
    def peak(self) -> float:
        """Peak bytes, including those of CUDA and its allocator."""
        allocated = max(sum(self.rollout.values()), sum(self.update.values()))
        return allocated * (1 + FRAGMENTED) + CONTEXT

    @property
    def fits(self) -> bool:
        """Whether it fits the GPU."""
        return self.peak <= GPUS[self.config.gpu].memory * GIB


def make_plan(config: PlanConfig) -> Plan:
    """Predict a step.

    Raises:
        UsageError: The model cannot be read, or there are no predictions for it or the algorithm.
    """
    if make_algorithm(config).has_critic:
        raise UsageError(
            f"algorithm: the models that {config.algorithm} holds beside the policy are not foretold"
        )
    dtype = torch.bfloat16 if config.dtype == "auto" else DTYPES[config.dtype]
    model = shape_of(config.model)
    policy = policy_on_meta(config, model, dtype)
    prompts = prompts_of_a_process(config, model)
    held = held_parts(policy, config, config.together)
    in_rollout, in_update = gathered_bytes(policy, config.together)
    step = step_of(config, model, dtype, prompts)
    if "reference" in make_algorithm(config).extra_models:
        step.flops["reference"] = step.flops["forward"]
    del step.flops["forward"]  # already in the update
    seconds = seconds_of(policy, config, step, prompts)
    return Plan(
        config,
        held | step.rollout | ({GATHERED: in_rollout} if in_rollout else {}),
        held | step.update | ({GATHERED: in_update} if in_update else {}),
        seconds,
        len(prompts[0].input_ids),
        step.passes,
    )


def step_of(config: PlanConfig, model: Any, dtype: torch.dtype, prompts: Sequence[EncodedPrompt]) -> Step:
    """The step of a model of any depth: since layers are alike, two shallow models are extrapolated to a deep one.

    Args:
        config: The run's configuration.
        model: The model's configuration.
        dtype: The dtype it computes in.
        prompts: The prompts that one process rolls out.
    """
    layers = model.get_text_config().num_hidden_layers

    def with_depth(depth: int) -> Step:
        policy = policy_on_meta(config, with_layers(model, depth), dtype)
        return run_on_meta(policy, config, prompts, together=config.together, on_gpu=True)

    few, more = SHALLOW
    if layers <= more:
        return with_depth(layers)
    return with_depth(few).drawn_on(with_depth(more), (layers - few) / (more - few))


def changes(config: PlanConfig) -> Iterator[dict[str, Any]]:
    """Changes that reduce a step's memory, cheapest first."""
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.feature_cache_bytes:
        yield {"feature_cache_bytes": 0}
    if config.sharding == "none" and config.gpus > 1:
        yield {"sharding": "fsdp2"}
    if config.max_cached_tokens > 1 << 15:
        yield {"max_cached_tokens": 1 << 15}
    if config.videos_per_step > config.gpus:
        yield {"videos_per_step": config.gpus}
    if not config.lora_r and not (config.freeze_vision_tower and config.freeze_projector):
        yield {"freeze_vision_tower": True, "freeze_projector": True}
    if not config.lora_r:
        unset = {"freeze_vision_tower": None, "freeze_projector": None, "freeze_language_model": None}
        yield {"lora_r": 64} | unset
    if config.max_frames > 16:
        yield {"max_frames": config.max_frames // 2, "min_frames": min(config.min_frames, 8)}


def make_fit(plan: Plan) -> tuple[list[str], Plan]:
    """Change the configuration until a step fits; every change is planned, not guessed.

    Returns:
        The changes as flags, and the last plan, which may still not fit.
    """
    flags: list[str] = []
    for change in changes(plan.config):
        changed = make_plan(dataclasses.replace(plan.config, **change))
        if changed.peak < plan.peak:
            plan = changed
            flags += [f"--{name} {_word(value)}" for name, value in change.items() if value is not None]
        if plan.fits:
            break
    return flags, plan


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
