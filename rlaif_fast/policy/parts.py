"""Which parts of a model train: tower, projector and decoder, as weights or through LoRA adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import find_family, unwrap
from rlaif_fast.policy.families.base import MLP_LAYERS, PARTS, ROUTER, guess_part, is_mixture

FREEZING = {
    "tower": "freeze_vision_tower",
    "projector": "freeze_projector",
    "decoder": "freeze_language_model",
}
NAMES = {"tower": "vision tower", "projector": "projector", "decoder": "language model"}


def part_of(model: nn.Module) -> Callable[[str], str]:
    """A function that tells by name which of `PARTS` a parameter or module of the model belongs to."""
    family = find_family(unwrap(model).config.model_type)
    return guess_part if family is None else family.part_of


def ready_to_train(model: nn.Module, options: Any) -> nn.Module:
    """Freeze, adapt and checkpoint the parts of a model as its options say.

    Args:
        model: The model as loaded.
        options: `ModelOptions`.

    Returns:
        The model, wrapped by peft if it has adapters.
    """
    apply_freezing(model, options)
    with warnings.catch_warnings():
        # peft reads a property that transformers 5.24 has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = add_lora(model, options) if options.lora_r > 0 else model
    if options.gradient_checkpointing:
        owner = cast(Any, model)
        renamed = getattr(owner, "activation_checkpointing_enable", None)  # transformers 5.24
        (renamed or owner.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def apply_freezing(model: nn.Module, options: Any) -> None:
    """Switch off the gradient of the parts that are not trained.

    Args:
        model: The model, without adapters.
        options: `ModelOptions`.

    Raises:
        UsageError: Nothing is left to train, or `train_router` is set and there is no router.
    """
    part, routers = part_of(model), 0
    for name, parameter in model.named_parameters():
        is_router = ROUTER.search(name) is not None
        routers += is_router
        frozen = getattr(options, FREEZING[part(name)]) or (is_router and not options.train_router)
        parameter.requires_grad_(not frozen and parameter.is_floating_point())  # 4-bit weights are bytes
    if options.train_router and not routers:
        raise UsageError("train_router: true has no effect: the model has no router")
    if not any(parameter.requires_grad for parameter in model.parameters()) and not options.lora_r:
        raise UsageError(
            "freeze_*: every part is frozen, nothing is left to train; unfreeze one or set lora_r"
        )


def lora_layers(model: nn.Module, parts: Sequence[str], targets: Sequence[str] | str | None) -> list[str]:
    """The full names of the linear layers that get an adapter.

    Args:
        model: The model, without adapters.
        parts: Some of `PARTS`, each of which gets adapters; empty puts them wherever the targets are.
        targets: Names of layers, or ends of their full names; None for the family's own in the decoder and every linear
            layer of the other parts. A string is a regular expression of full names, as in adapters from elsewhere.

    Raises:
        UsageError: A target names no linear layer of these parts, or there is no such layer at all.
    """
    part, among = part_of(model), parts or PARTS
    head = unwrap(model).get_output_embeddings()
    layers = {
        name: part(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part(name) in among
    }
    if targets is None:
        family = find_family(unwrap(model).config.model_type)
        usual = None if family is None else set(family.lora_names(unwrap(model).config))
        chosen = [
            name
            for name, own in layers.items()
            if own != "decoder" or usual is None or name.rpartition(".")[2] in usual
        ]
        # peft takes these names for the experts, wherever the layers are.
        if is_mixture(unwrap(model).config):
            chosen = [name for name in chosen if name.rpartition(".")[2] not in MLP_LAYERS]
    elif isinstance(targets, str):
        chosen = [name for name in layers if re.fullmatch(targets, name)]
    else:
        ends = tuple(f".{target}" for target in targets)
        unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in layers)]
        if unknown:
            there = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(
                f"lora_target_modules: no linear layer of the {_named(among)} is named {', '.join(unknown)}; "
                f"there are {', '.join(there)}"
            )
        chosen = [name for name in layers if f".{name}".endswith(ends)]
    if not chosen:
        raise UsageError(f"lora_modules: there is no linear layer in the {_named(among)}")
    bare = [one for one in parts if not any(part(name) == one for name in chosen)]
    if bare:
        raise UsageError(
            f"lora_modules: no layer of the {_named(bare)} would get an adapter; leave it out, or name its layers in "
            "lora_target_modules"
        )
    return chosen


def add_lora(model: nn.Module, options: Any) -> nn.Module:
    """Put LoRA adapters on linear layers; peft then freezes the rest of the model.

    The layers are a list of names, not a regular expression, so that vLLM accepts the adapters. In a bfloat16 model the
    adapters are bfloat16, and the optimizer keeps float32 copies, as for all trained weights. peft would make them
    float32: their products would be float32 too, and each layer would keep a float32 copy of its input.

    Raises:
        UsageError: peft is missing, or does not put adapters on exactly those layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UsageError('lora_r: LoRA needs peft: pip install "rlaif-fast[train]"') from None
    chosen = lora_layers(model, options.lora_modules, options.lora_target_modules)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        use_rslora=options.use_rslora,
        lora_dropout=options.lora_dropout,
        target_modules=chosen,
    )
    try:
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"lora_target_modules: {error}") from error
    found = {name for name, module in unwrap(adapted).named_modules() if hasattr(module, "lora_A")}
    if found != set(chosen):
        moved = sorted({name.rpartition(".")[2] for name in set(chosen) - found})
        raise UsageError(
            f"lora_target_modules: peft takes {', '.join(moved)} for the experts of this mixture; leave them out"
        )
    if cast(Any, model).get_input_embeddings().weight.dtype == torch.bfloat16:
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.bfloat16()
    return adapted


def check_parts(parts: Sequence[str]) -> None:
    """Refuse unknown parts.

    Raises:
        UsageError: Some are unknown; the message names them.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UsageError(f"lora_modules: expected some of {', '.join(PARTS)}, got {list(parts)}")


def _named(parts: Sequence[str]) -> str:
    return " and ".join(NAMES[part] for part in parts)
