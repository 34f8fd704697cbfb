"""Load a Video-LLM and its tokenizer from a folder or a hub name, ready to train."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.policy.flash import refuses_flash
from rlaif_fast.video import PatchSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROJECTOR_PARTS = (".merger.", ".deepstack_merger_list.")


@dataclass
class ModelOptions:
    """Which policy to train and which parts of it.

    Attributes:
        model: A local checkpoint folder, a hub name, or "tiny" ("tiny-qwen2_5_vl"), the small policy made on the spot.
        dtype: "auto" is bfloat16 on a GPU that has it, else float32; or "float32", "bfloat16", "float16".
        attn_implementation: "auto" is flash_attention_2 where it can run, else sdpa; any transformers name is taken.
        device: "auto" is the GPU where there is one; or "cpu", "cuda", "cuda:1".
        gradient_checkpointing: Recompute the language model's layers in the backward pass.
        freeze_vision_tower: Do not train the vision tower.
        freeze_projector: Do not train the projector between vision tower and language model.
        freeze_language_model: Do not train the language model.
        lora_r: Rank of LoRA adapters on the language model's linear layers; 0 trains the weights themselves.
        lora_alpha: LoRA scale.
        lora_dropout: Dropout in front of the adapters.
        lora_target_modules: Names of the linear layers of the language model that get an adapter.
        shared_prefix: Compute each prompt once a group. false is the plain path of other trainers (any family).
        attention_backend: How the shared prefix is attended to: "auto", "flash", "torch_flash", "sdpa", "flex",
            "reference".
        max_packed_tokens: Most tokens in one packed row, and in one forward and backward pass.
        max_cached_tokens: Most tokens whose keys and values a rollout holds at once; more prompts take turns.
        feature_cache_bytes: Bytes of a frozen vision tower's features kept from step to step.
        min_pixels: Fewest pixels of a resized frame or image.
        max_pixels: Most pixels of a resized frame or image.
        total_pixels: Most pixels of all frames of a prompt together; null for no bound.
        system_prompt: System turn for rows that bring none; null leaves it to the chat template.
    """

    model: str = "tiny"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    freeze_vision_tower: bool = False
    freeze_projector: bool = False
    freeze_language_model: bool = False
    lora_r: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    shared_prefix: bool = True
    attention_backend: str = "auto"
    max_packed_tokens: int = 16384
    max_cached_tokens: int = 2**17
    feature_cache_bytes: int = 2**30
    min_pixels: int = 1024
    max_pixels: int = 1024
    total_pixels: int | None = None
    system_prompt: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to feed it; `notes` says which choices "auto" made."""

    model: nn.Module
    tokenizer: object
    model_type: str
    patch_spec: PatchSpec
    device: torch.device
    notes: tuple[str, ...]

    @property
    def vision_dtype(self) -> torch.dtype:
        """What the vision tower computes in."""
        visual = next(p for name, p in self.model.named_parameters() if "visual" in name or "vision" in name)
        return visual.dtype


def resolve_device(device: str) -> torch.device:
    """The device "auto" stands for, or the named one if it is there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {device!r} was asked for, but torch sees no GPU; use --device cpu")
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype "auto" stands for on `device`, or the named one."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The attention implementation "auto" stands for, and why."""
    if name != "auto":
        return name, f"attention: {name} (asked for)"
    if device.type != "cuda":
        return "sdpa", "attention: sdpa (no GPU)"
    reason = refuses_flash(device, dtype)
    if reason is not None:
        return "sdpa", f"attention: sdpa (no flash-attn: {reason})"
    return "flash_attention_2", "attention: flash_attention_2"


def load_model(options: ModelOptions) -> LoadedModel:
    """Load `options.model` (a folder or hub name), freeze and adapt it as asked.

    Raises:
        UsageError: The folder or name cannot be loaded, or an option does not fit the model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    attention, attention_note = resolve_attention(options.attn_implementation, device, dtype)
    try:
        config = AutoConfig.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        loaded = AutoModelForImageTextToText.from_pretrained(
            options.model, config=config, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"model: cannot load {options.model!r}: {reason}") from error
    if tokenizer.chat_template is None:
        raise UsageError(f"model: {options.model!r} has no chat template; use an instruct checkpoint")
    model: nn.Module = cast(nn.Module, loaded).to(device)
    apply_freezing(model, options)
    if options.lora_r > 0:
        model = add_lora(model, options)
    if options.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not options.lora_r:
            module.p = 0.0
    notes = (f"device: {device}, dtype: {str(dtype).removeprefix('torch.')}", attention_note)
    return LoadedModel(
        model, tokenizer, config.model_type, read_patch_spec(options.model, config), device, notes
    )


def apply_freezing(model: nn.Module, options: ModelOptions) -> None:
    """Switch off the gradient of the parts that are not to be trained.

    Raises:
        UsageError: Nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        in_vision = ".visual." in f".{name}"
        in_projector = in_vision and any(part in name for part in PROJECTOR_PARTS)
        if in_projector:
            parameter.requires_grad_(not options.freeze_projector)
        elif in_vision:
            parameter.requires_grad_(not options.freeze_vision_tower)
        else:
            parameter.requires_grad_(not options.freeze_language_model)
    if not any(parameter.requires_grad for parameter in model.parameters()) and not options.lora_r:
        raise UsageError(
            "freeze_*: every part is frozen, nothing is left to train; unfreeze one or set lora_r"
        )


def add_lora(model: nn.Module, options: ModelOptions) -> nn.Module:
    """Put LoRA adapters on the language model's linear layers; the rest of the model is then frozen by peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UsageError('lora_r: LoRA needs peft: pip install "rlaif-fast[train]"') from None
    names = "|".join(options.lora_target_modules)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=rf".*language_model.*\.({names})",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_target_modules: {error}") from error


def read_patch_spec(model: str, config) -> PatchSpec:
    """Patch sizes from the model config, mean and deviation from its preprocessor file."""
    vision = config.vision_config
    means = None
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        settings = _read_json(model, name)
        if settings and "image_mean" in settings:
            means = tuple(settings["image_mean"]), tuple(settings["image_std"])
            break
    if means is None:
        raise RlaifFastError(
            f"model: {model!r} has no preprocessor_config.json with image_mean and image_std; copy it from the "
            "checkpoint it was trained from"
        )
    return PatchSpec(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        mean=means[0],
        std=means[1],
    )


def _read_json(model: str, name: str) -> dict | None:
    from transformers.utils import cached_file

    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text())
