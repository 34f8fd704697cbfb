"""A family outside the table: its own Hugging Face processor makes the prompts, and the plain path trains it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlaif_fast.errors import first_line
from rlaif_fast.policy.families.base import refuse
from rlaif_fast.policy.prompt import EncodedPrompt

# the head is then not a linear layer
MASKED_LOGITS = {"chameleon"}  # pictures' own tokens
SCALED_LOGITS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *(
        "logit_scale",
        "logits_scaling",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_mup_width_multiplier",
    ),
)


def load_processor(model: str, model_type: str) -> Any:
    """The processor of a model, which makes its prompts.

    Raises:
        UsageError: It cannot be built, or has no chat template.
    """
    from transformers import AutoProcessor

    what = f"{model!r} ({model_type}) is not in the table of families and goes through its own processor"
    if importlib.util.find_spec("torchvision") is None:
        raise refuse(f"{what}, which needs torchvision: pip install torchvision")
    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a processor may raise anything, depending on its files
        raise refuse(f"{what}, which cannot be built: {first_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise refuse(f"{what}, and the folder has none (preprocessor_config.json, processor_config.json)")
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise refuse(f"{what}, which has no chat template; use an instruct checkpoint")
    return processor


def check_head(config: Any) -> None:
    """Refuse a model that changes its logits after the output embedding.

    Raises:
        UsageError: It does.
    """
    if config.model_type in MASKED_LOGITS:
        raise refuse(
            f"{config.model_type}: it changes its logits (those of pictures are masked), which is not supported"
        )
    text = config.get_text_config()
    for name in SCALED_LOGITS:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise refuse(f"{config.model_type}: {name} changes its logits, which is not supported")


def processor_inputs(rows: Sequence[EncodedPrompt], width: int, padding_side: str) -> dict[str, Tensor]:
    """Inputs of the model's own forward besides tokens and mask, for one row per prompt.

    Inputs with one value per token are padded to `width` with zeros, since text follows a prompt; the rest is joined.

    Raises:
        UsageError: The processor made tensors of different shapes, which one batch cannot hold.
    """
    names = {name: None for row in rows for name in (row.inputs or {})}
    joined = {}
    for name in names:
        values = [(row, row.inputs[name]) for row in rows if row.inputs and name in row.inputs]
        if all(value.shape == (1, len(row.input_ids)) for row, value in values):
            joined[name] = torch.cat([_padded(value, width, padding_side) for _, value in values])
            continue
        try:
            joined[name] = torch.cat([value for _, value in values])
        except RuntimeError as error:
            shapes = ", ".join(sorted({str(tuple(value.shape)) for _, value in values}))
            raise refuse(
                f"its processor made {name} of the shapes {shapes}, which one batch cannot hold; set nframes, or "
                "videos_per_step: 1"
            ) from error
    return joined


def _padded(value: Tensor, width: int, side: str) -> Tensor:
    missing = width - value.shape[1]
    return functional.pad(value, (0, missing) if side == "right" else (missing, 0))
