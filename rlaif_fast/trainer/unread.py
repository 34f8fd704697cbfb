"""Keys that a configuration sets but, given its other keys, does not read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path

from rlaif_fast.algorithms.options import OF_A_CRITIC
from rlaif_fast.algorithms.registry import ALGORITHMS, make_algorithm
from rlaif_fast.data.benchmarks import BENCHMARKS
from rlaif_fast.errors import UsageError
from rlaif_fast.trainer.drawing import on_policy
from rlaif_fast.trainer.options import OWN_SAMPLERS, TINY_FAMILIES, SftOptions, TrainConfig

SYNTHETIC = (
    *(field.name for field in fields(TrainConfig) if field.name.startswith("synthetic_")),
    *("label_noise", "label_confusion", "multiple_choice_fraction", "codec"),
)
SUPERVISED = tuple(field.name for field in fields(SftOptions) if field.name != "sft")
REINFORCED = (
    *("videos_per_step", "questions_per_video", "num_iterations", "steps_per_generation", "rollout_lag"),
    *("learning_rate", "warmup_steps", "lr_scheduler_type", "min_lr_ratio", "weight_decay"),
    *("adam_beta1", "adam_beta2", "sampling_ratio_cap", "mask_truncated_completions"),
    *("dynamic_sampling", "dynamic_sampling_rounds", "early_stopping_patience", "blind_control"),
    *("beta", "kl", "epsilon", "epsilon_high", "delta", "entropy_coef", "loss_type"),
    *("importance_sampling_level", *OF_A_CRITIC),
)
# Also for the responses to a few test clips, which a run without RL records too.
SAMPLED = (
    *("num_generations", "temperature", "top_p", "top_k"),
    *("advantage", "penalty_weight", "scale", "score", "weight_by_confidence"),
)
# Of the oracle, which final answers are shown to where it chooses the checkpoint.
JUDGED = ("feedback", "feedback_strength", "oracle_noise", "oracle_shuffle", "max_invalid_fraction")
# In either stage.
LEARNING = ("eval_steps", "max_grad_norm", "optimizer_offload", "gradient_checkpointing", "backend")
# Limits on how far the policy moves from the rollout: it does not if the drawing weights learn from it once, whole.
OFF_POLICY = ("epsilon", "epsilon_high", "delta", "cliprange_value")
ADAPTED = ("lora_alpha", "use_rslora", "lora_dropout", "lora_modules", "lora_target_modules")
PACKED = ("attention_backend", "max_cached_tokens", "feature_cache_bytes")


def unread(config: TrainConfig) -> dict[str, str]:
    """Every key that nothing reads under this configuration, with the reason."""
    return {name: where for names, where in _unread(config) for name in names}


def _unread(config: TrainConfig) -> Iterator[tuple[Collection[str], str]]:
    own = [path for path in (config.sft_data, config.validation_data, config.test_data) if path]
    if config.data != "synthetic":
        yield SYNTHETIC, f"data is {config.data}"
    else:
        yield from _replaced(config)
    if config.data == "synthetic" and all(_is_benchmark(path) for path in own):
        yield ("media_root",), f"data is synthetic{' and the rest a benchmark' if own else ''}"
    if all(_has_file(config, split) for split in ("validation", "test")):
        yield ("holdout_fraction",), "validation and test have files of their own"
    if config.sft != "auto":
        yield SUPERVISED, f"sft is {config.sft}"
        if config.data == "synthetic":
            yield ("label_noise", "label_confusion"), f"sft is {config.sft}"
        elif _has_file(config, "rl") and config.model not in TINY_FAMILIES:  # tiny: its words
            yield ("sft_data",), f"sft is {config.sft}"
    elif config.sft_steps == 0:
        yield [name for name in SUPERVISED if name != "sft_steps"], "sft_steps is 0"
    if config.max_steps == 0:
        yield REINFORCED, "max_steps is 0"
        if config.gallery_clips == 0:
            yield SAMPLED, "max_steps and gallery_clips are 0"
            if config.metric_for_best_model in ("accuracy", "none"):  # "auto" looks at the data
                yield JUDGED, "max_steps and gallery_clips are 0, and the oracle is not the metric"
        if config.sft != "auto" or config.sft_steps == 0:
            yield LEARNING, "neither stage has a step"
    else:
        if config.beta == 0:
            yield ("kl",), "beta is 0"
        if config.eval_steps > config.max_steps:
            yield ("blind_control",), f"max_steps is less than eval_steps ({config.eval_steps})"
        if config.algorithm in ALGORITHMS and on_policy(config, make_algorithm(config)):
            yield OFF_POLICY, "num_iterations and steps_per_generation are 1"
    if config.nframes is not None:
        where = f"nframes is {config.nframes}"
        yield ("fps",), where
        if config.data == "synthetic" and not own:  # rows of other data may have their own rates
            yield ("min_frames", "max_frames"), where
    if config.lr_scheduler_type != "cosine":
        yield ("min_lr_ratio",), f"lr_scheduler_type is {config.lr_scheduler_type}"
    if config.oracle == "reference":
        yield ("weight_by_confidence",), "the reference oracle is always sure"
    if not config.lora_r:
        yield ADAPTED, "lora_r is 0"
    if not config.lora_r and not config.freeze_vision_tower:
        yield ("feature_cache_bytes",), "the vision tower trains"
    if not config.dynamic_sampling:
        yield ("dynamic_sampling_rounds",), "dynamic_sampling is false"
    if config.sampler in ("plain", "vllm"):
        yield ("max_cached_tokens",), f"sampler is {config.sampler}"
    if config.sampler in OWN_SAMPLERS:
        yield ("sampling_ratio_cap",), f"sampler is {config.sampler}"
    if not config.shared_prefix:
        yield PACKED, "shared_prefix is false"


def _replaced(config: TrainConfig) -> Iterator[tuple[Collection[str], str]]:
    """What describes synthetic splits that files replace, or questions that they lack."""
    for split in ("sft", "validation", "test"):
        if getattr(config, f"{split}_data") is not None:
            weak = ("label_noise", "label_confusion") if split == "sft" else ()
            yield (f"synthetic_{split}_clips", *weak), f"{split}_data is given"
    if config.synthetic_sft_clips == 0:
        yield ("label_noise", "label_confusion"), "synthetic_sft_clips is 0"
    elif config.multiple_choice_fraction == 1:
        yield ("label_confusion",), "multiple_choice_fraction is 1"


def _has_file(config: TrainConfig, split: str) -> bool:
    """Whether a split is read from a file; the synthetic data has all splits."""
    given = getattr(config, f"{split}_data", None)
    return given is not None or config.data == "synthetic" or (Path(config.data) / f"{split}.jsonl").exists()


def _is_benchmark(path: str) -> bool:
    """Whether a split is a published benchmark, which knows where its media are."""
    return path.partition(":")[0] in BENCHMARKS


def tell_unread(config: TrainConfig, by_flag: Collection[str], by_file: Collection[str]) -> list[str]:
    """A line for each reason why keys of a configuration file are not read, since a file may serve many runs.

    Args:
        config: The configuration.
        by_flag: Keys that the command line sets.
        by_file: Keys that a file sets.

    Raises:
        UsageError: A key of the command line is not read.
    """
    found = unread(config)
    for where, names in _by_reason(found, by_flag):
        raise UsageError(f"{', '.join(names)}: not read where {where}; leave it out")
    return [f"not read, since {where}: {', '.join(names)}" for where, names in _by_reason(found, by_file)]


def _by_reason(found: dict[str, str], given: Collection[str]) -> list[tuple[str, list[str]]]:
    reasons = dict.fromkeys(where for name, where in found.items() if name in given)
    return [
        (why, [name for name, where in found.items() if where == why and name in given]) for why in reasons
    ]
