"""Load a Video-LLM and its tokenizer from a folder or a hub name, ready to train."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlaif_fast.errors import UsageError, first_line, require
from rlaif_fast.policy import quantization
from rlaif_fast.policy.families import Family, find_family
from rlaif_fast.policy.flash import refuses_flash
from rlaif_fast.policy.frontend import load_frontend, read_config
from rlaif_fast.policy.model_files import refuse_other_base
from rlaif_fast.policy.parts import FREEZING, apply_freezing, check_parts, ready_to_train
from rlaif_fast.policy.weights import (
    ADAPTER_CONFIG,
    adapter_config,
    load_adapters,
    load_strictly,
    looks_like_a_path,
)
from rlaif_fast.streams import numbered
from rlaif_fast.video import PatchSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelOptions:
    """Which policy to train and which parts of it.

    Attributes:
        model: A local checkpoint folder, a hub name, or "tiny" ("tiny-qwen2_5_vl"), the small policy made on the spot.
        dtype: "auto" is bfloat16 on a GPU that supports it, else float32; or "float32", "bfloat16", "float16".
        attn_implementation: "auto" is flash_attention_2 if it can run, else sdpa; any transformers name works.
        device: "auto" is the GPU if there is one; or "cpu", "cuda", "cuda:1".
        gradient_checkpointing: Recompute the language model's layers in the backward pass.
        freeze_vision_tower: Do not train the vision tower. null is false, and true where there are LoRA adapters,
            which leave nothing else to train.
        freeze_projector: Do not train the projector between vision tower and language model; null likewise.
        freeze_language_model: Do not train the language model; null likewise.
        load_in_4bit: Hold the decoder's frozen weights in 4 bits (NF4 of bitsandbytes) under LoRA adapters; see
            `lora_r`.
        train_router: Train the router of a mixture of experts too; false freezes it.
        lora_r: Rank of LoRA adapters on linear layers; 0 trains the weights themselves.
        lora_alpha: LoRA scale.
        use_rslora: Scale the adapters by lora_alpha / sqrt(lora_r) (rsLoRA) in place of lora_alpha / lora_r.
        lora_dropout: Dropout in front of the adapters.
        lora_modules: Parts that get adapters: "decoder", "tower", "projector". With an empty list, adapters go wherever
            the layers of `lora_target_modules` are.
        lora_target_modules: Names of the linear layers that get an adapter; null is the family's own in the decoder,
            and all in the tower and the projector.
        shared_prefix: Compute each prompt once per group. false is the plain path of other trainers (any family).
        attention_backend: Attention over the shared prefix: "auto", "flash", "torch_flash", "sdpa", "flex",
            "reference".
        max_packed_tokens: Most tokens in one packed row, and in one forward and backward pass.
        max_cached_tokens: Most tokens whose keys and values a rollout holds at once; more prompts take turns.
        feature_cache_bytes: Bytes of a frozen vision tower's features kept from step to step.
        min_pixels: Fewest pixels of a resized frame or image.
        max_pixels: Most pixels of a resized frame or image.
        total_pixels: Most pixels of all frames of a prompt together; null for no bound.
        system_prompt: System turn for rows without one; null leaves it to the chat template.
    """

    model: str = "tiny"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    freeze_vision_tower: bool | None = None
    freeze_projector: bool | None = None
    freeze_language_model: bool | None = None
    load_in_4bit: bool = False
    train_router: bool = False
    lora_r: int = 0
    lora_alpha: int = 32
    use_rslora: bool = False
    lora_dropout: float = 0.0
    lora_modules: list[str] = field(default_factory=lambda: ["decoder"])
    lora_target_modules: list[str] | None = None
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
    """A model with what is needed to feed it; `notes` says what "auto" chose.

    `processor` is the model's own, if its family is not in the table.
    """

    model: nn.Module
    tokenizer: Any
    model_type: str
    patch_spec: PatchSpec
    device: torch.device
    notes: tuple[str, ...]
    processor: Any = None

    @property
    def vision_dtype(self) -> torch.dtype:
        """The dtype that the vision tower computes in."""
        named = self.model.named_parameters()
        visual = next((p for name, p in named if "visual" in name or "vision" in name), None)
        return next(self.model.parameters()).dtype if visual is None else visual.dtype


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
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {device!r} was asked for, and torch sees {torch.cuda.device_count()} GPUs")
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype "auto" stands for on `device`, or the named one."""
    if dtype == "auto":
        is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_fast else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The attention implementation "auto" stands for, and why."""
    if name != "auto":
        return name, f"attn_implementation: {name} (asked for)"
    if device.type != "cuda":
        return "sdpa", "attn_implementation: sdpa (no GPU)"
    reason = refuses_flash(device, dtype)
    if reason is not None:
        return "sdpa", f"attn_implementation: sdpa (no flash-attn: {reason})"
    return "flash_attention_2", "attn_implementation: flash_attention_2"


def load_model(options: ModelOptions) -> LoadedModel:
    """Load `options.model` (a folder or hub name), freeze and adapt it as asked.

    Raises:
        UsageError: The folder or name cannot be loaded, or an option does not fit the model.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = numbered(resolve_device(options.device))
    dtype = resolve_dtype(options.dtype, device)
    attention, attention_note = resolve_attention(options.attn_implementation, device, dtype)
    adapters = adapter_folder(options.model)
    if adapters is not None:
        return load_adapted(options, adapters)
    config = read_config(options.model)
    frontend = load_frontend(options.model, config)
    packing = quantization.loading_options(config, dtype, device) if options.load_in_4bit else {}
    chosen_here = options.attn_implementation == "auto"
    names = list(dict.fromkeys((attention, "sdpa", "eager"))) if chosen_here else [attention]
    for name in names:
        try:
            loaded = load_strictly(
                AutoModelForImageTextToText,
                options.model,
                f"model: {options.model}",
                config=config,
                dtype=dtype,
                attn_implementation=name,
                **packing,
            )
            break
        except (OSError, ValueError, ImportError) as error:
            if name == names[-1] or "does not support" not in str(error):
                raise UsageError(f"model: cannot load {options.model!r}: {first_line(error)}") from error
    if name != attention:
        attention_note = f"attn_implementation: {name} (the model does not support {attention})"
    without_noise(loaded)
    model = ready_to_train(cast(nn.Module, loaded).to(device), options)
    model.train()
    notes = [f"device: {device}, dtype: {str(dtype).removeprefix('torch.')}", attention_note]
    if packing:
        notes.append("decoder: its linear layers are held in 4 bits (NF4)")
    family = find_family(config.model_type) or Family()
    notes += family.notes(config, options.lora_r > 0)
    if frontend.patch_spec.tokens_a_frame is not None:
        side = frontend.patch_spec.factor
        notes.append(f"frames: {side}x{side}, as its tower takes them, whatever *_pixels say")
    return LoadedModel(
        model,
        frontend.tokenizer,
        config.model_type,
        frontend.patch_spec,
        device,
        tuple(notes),
        frontend.processor,
    )


def without_noise(model: nn.Module) -> None:
    """Switch off a model's randomness in training: dropout, as modules or numbers, and router jitter.

    A response is scored by the policy that drew it; adapters add the configured dropout later.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            dropped = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if isinstance(value, float) and (dropped or re.search("drop|jitter", name)):
                setattr(module, name, 0.0)


def adapter_folder(model: str) -> Path | None:
    """The folder that `model` names, if it holds LoRA adapters instead of a model."""
    folder = Path(model).expanduser()
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def base_of(model: str) -> str:
    """The model that `model` names, or that the LoRA adapters of this folder were trained on.

    Raises:
        UsageError: The adapters are of a kind that cannot be loaded.
    """
    folder = adapter_folder(model)
    return model if folder is None else adapter_config(folder, f"model: {model}")["base_model_name_or_path"]


def load_adapted(options: ModelOptions, folder: Path) -> LoadedModel:
    """Load the model that LoRA adapters were trained on, and the adapters.

    With `lora_r` the adapters are trained further; without it they are merged into the weights, which are trained.

    Raises:
        UsageError: The base cannot be loaded, has other files than the adapters were trained on, or the adapters do
            not fit it or the options.
    """
    what = f"model: {options.model}"
    saved = adapter_config(folder, what)
    base = saved["base_model_name_or_path"]
    refuse_other_base(folder, base, what)
    r = options.lora_r or saved.get("r", 0)
    alpha = options.lora_alpha if options.lora_r else saved.get("lora_alpha", 0)
    rooted = options.use_rslora if options.lora_r else bool(saved.get("use_rslora"))
    scaled = dataclasses.replace(options, model=base, lora_r=r, lora_alpha=alpha, use_rslora=rooted)
    if not options.lora_r:
        freezing: dict[str, Any] = dict.fromkeys(FREEZING.values())
        targets = saved.get("target_modules")
        parts = [] if targets else ["decoder"]
        scaled = dataclasses.replace(scaled, lora_target_modules=targets, lora_modules=parts, **freezing)
    try:
        loaded = load_model(scaled)
    except UsageError as error:
        moved = looks_like_a_path(base) and not Path(base).expanduser().exists()
        # A run's files are sealed, so another path cannot be written into them.
        remedy = "; bring it back, or put a link to its new place there" if moved else ""
        raise UsageError(f"{what} holds LoRA adapters of the model {base!r}: {error}{remedy}") from error
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
        UsageError: A part is to be trained beside adapters, or adapters are configured but there are none.
    """
    if options.lora_r:
        asked = [name for name in FREEZING.values() if getattr(options, name) is False]
        if asked:
            raise UsageError(
                f"{asked[0]}: false has no effect beside lora_r {options.lora_r}, which trains the adapters alone; "
                "leave it out, or set lora_r to 0"
            )
        require(options.lora_alpha > 0, "lora_alpha", "1 or more", options.lora_alpha)
        require(options.lora_target_modules != [], "lora_target_modules", "at least one name", [])
        if options.lora_modules or not options.lora_target_modules:
            check_parts(options.lora_modules)
        return
    require(not options.load_in_4bit, "load_in_4bit", "false where lora_r is 0", options.load_in_4bit)
