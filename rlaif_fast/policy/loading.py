"""Load a Video-LLM and its tokenizer from a folder or a hub name, ready to train."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlaif_fast.errors import RlaifFastError, UsageError, require
from rlaif_fast.policy.flash import refuses_flash
from rlaif_fast.policy.weights import (
    ADAPTER_CONFIG,
    adapter_config,
    check_config,
    load_adapters,
    load_strictly,
)
from rlaif_fast.video import PatchSpec

PREPROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FREEZING = ("freeze_vision_tower", "freeze_projector", "freeze_language_model")
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
        freeze_vision_tower: Do not train the vision tower. null is false, and true where there are LoRA adapters,
            which leave nothing else to train.
        freeze_projector: Do not train the projector between vision tower and language model; null likewise.
        freeze_language_model: Do not train the language model; null likewise.
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
    freeze_vision_tower: bool | None = None
    freeze_projector: bool | None = None
    freeze_language_model: bool | None = None
    lora_r: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
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
    adapters = adapter_folder(options.model)
    if adapters is not None:
        return load_adapted(options, adapters)
    check_config(options.model, "model")
    try:
        config = AutoConfig.from_pretrained(options.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        loaded = load_strictly(
            AutoModelForImageTextToText,
            options.model,
            f"model: {options.model}",
            config=config,
            dtype=dtype,
            attn_implementation=attention,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"model: cannot load {options.model!r}: {reason}") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = read_chat_template(options.model)
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


def adapter_folder(model: str) -> Path | None:
    """The folder that `model` names where that holds LoRA adapters instead of a model."""
    folder = Path(model).expanduser()
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def load_adapted(options: ModelOptions, folder: Path) -> LoadedModel:
    """Load the model that LoRA adapters were trained on, and the adapters.

    With `lora_r` the adapters are trained on; without it they are merged into the weights, which are trained.

    Raises:
        UsageError: The base cannot be loaded, or the adapters do not fit it or the options.
    """
    what = f"model: {options.model}"
    saved = adapter_config(folder, what)
    base = saved["base_model_name_or_path"]
    r = options.lora_r or saved.get("r", 0)
    alpha = options.lora_alpha if options.lora_r else saved.get("lora_alpha", 0)
    scaled = dataclasses.replace(options, model=base, lora_r=r, lora_alpha=alpha)
    if not options.lora_r:
        freezing: dict[str, Any] = dict.fromkeys(FREEZING)
        targets = saved.get("target_modules")
        names = list(targets) if isinstance(targets, list) else list(LORA_TARGETS)
        scaled = dataclasses.replace(scaled, lora_target_modules=names, **freezing)
    try:
        loaded = load_model(scaled)
    except UsageError as error:
        raise UsageError(f"{what} holds LoRA adapters of the model {base!r}: {error}") from error
    load_adapters(loaded.model, folder, what)
    if options.lora_r:
        return loaded
    model = cast(Any, loaded.model).merge_and_unload()
    model.requires_grad_(True)
    apply_freezing(model, options)
    notes = (*loaded.notes, f"The LoRA adapters of {options.model} are merged into the weights of {base}.")
    return dataclasses.replace(loaded, model=model, notes=notes)


def check_lora(options: ModelOptions) -> None:
    """Refuse flags that would have no effect.

    Raises:
        UsageError: A part is to be trained beside adapters, or adapters are described and there are none.
    """
    if options.lora_r:
        asked = [name for name in FREEZING if getattr(options, name) is False]
        if asked:
            raise UsageError(
                f"{asked[0]}: false has no effect beside lora_r {options.lora_r}, which trains the adapters alone; "
                "leave it out, or set lora_r to 0"
            )
        require(options.lora_alpha > 0, "lora_alpha", "1 or more", options.lora_alpha)
        require(bool(options.lora_target_modules), "lora_target_modules", "at least one name", [])
        return
    usual = ModelOptions()
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
        if getattr(options, name) != getattr(usual, name):
            raise UsageError(f"{name}: {getattr(options, name)} has no effect where lora_r is 0; set lora_r")


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
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".language_model." in f".{name}"
    }
    unknown = [name for name in options.lora_target_modules if name not in linear]
    if unknown:
        raise UsageError(
            f"lora_target_modules: no linear layer of the language model is named {', '.join(unknown)}; "
            f"there are {', '.join(sorted(linear))}"
        )
    names = "|".join(map(re.escape, options.lora_target_modules))
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
    whole = _read_json(model, "processor_config.json") or {}
    candidates = [_read_json(model, name) for name in PREPROCESSOR_FILES]
    for settings in (*candidates, whole.get("video_processor"), whole.get("image_processor")):
        if settings and "image_mean" in settings:
            means = tuple(settings["image_mean"]), tuple(settings["image_std"])
            break
    if means is None:
        raise RlaifFastError(
            f"model: {model!r} has no preprocessor_config.json or processor_config.json with image_mean and "
            "image_std; copy it from the checkpoint it was trained from"
        )
    return PatchSpec(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        mean=means[0],
        std=means[1],
    )


def read_chat_template(model: str) -> str | None:
    """The chat template beside a model whose tokenizer has none: chat_template.jinja or chat_template.json."""
    from transformers.utils import cached_file

    path = cached_file(model, "chat_template.jinja", _raise_exceptions_for_missing_entries=False)
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = (_read_json(model, name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _read_json(model: str, name: str) -> dict | None:
    from transformers.utils import cached_file

    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text())
