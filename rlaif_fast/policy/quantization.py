"""QLoRA: the decoder's frozen weights in 4 bits (NF4, by bitsandbytes), under adapters that train."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import find_family
from rlaif_fast.policy.families.base import is_mixture, refuse


def check_available() -> None:
    """Refuse 4 bits if a required package is missing.

    Raises:
        UsageError: bitsandbytes is missing, or accelerate, which transformers needs to load packed weights.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UsageError(f'load_in_4bit: expected false without {names}; pip install "rlaif-fast[qlora]"')


def refuse_quantized(model: str, config: Any) -> None:
    """Refuse a checkpoint whose weights are stored quantized (FP8, AWQ, GPTQ, 4 bits, ...): they cannot be trained.

    Raises:
        UsageError: Its configuration says that they are.
    """
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if settings:
            values = settings if isinstance(settings, dict) else settings.to_dict()
            method = values.get("quant_method", "quantization_config")
            raise refuse(
                f"{model!r} holds quantized weights ({method}), which cannot be trained; use the "
                "checkpoint that it was made from, with load_in_4bit: true for QLoRA"
            )


def loading_options(config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that pack the decoder's linear layers.

    Tower, projector and head keep their dtype: they are a small part of the weights, and the fused loss reads the head.

    Args:
        config: The model's configuration.
        dtype: The dtype that a pass computes in.
        device: Where the weights go; they are packed there.

    Raises:
        UsageError: bitsandbytes is missing; or the model's family has no known layers, or it is a mixture, whose
            experts are not linear layers.
    """
    from transformers import BitsAndBytesConfig

    check_available()
    family = find_family(config.model_type)
    if family is None or is_mixture(config):
        raise UsageError(f"load_in_4bit: expected false for the model family {config.model_type!r}")
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", family.tower, *family.projector],
    )
    return {"quantization_config": packing, "device_map": {"": str(device)}}
