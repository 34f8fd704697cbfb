"""A model's front end: its configuration, tokenizer, chat template, and how frames become its inputs.

All of it is read before any weight, so that a model with unusable inputs is refused within a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_fast.errors import RlaifFastError, UsageError, first_line
from rlaif_fast.policy import quantization
from rlaif_fast.policy.families import find_family
from rlaif_fast.policy.families.base import refuse
from rlaif_fast.policy.families.processor import check_head, load_processor
from rlaif_fast.policy.weights import check_config
from rlaif_fast.video import PatchSpec

VIDEO_SETTINGS = "video_preprocessor_config.json"
IMAGE_SETTINGS = "preprocessor_config.json"
# For a model whose own processor cuts frames: it gets them nearly unchanged, in pairs.
WHOLE_FRAMES = PatchSpec(patch_size=2, temporal_patch_size=2, merge_size=1)


@dataclass(frozen=True)
class Frontend:
    """Everything that makes a model's prompts.

    Attributes:
        config: The model's configuration.
        tokenizer: With a chat template.
        patch_spec: How frames are cut.
        processor: The model's own processor if the family is not in the table; else None.
    """

    config: Any
    tokenizer: Any
    patch_spec: PatchSpec
    processor: Any = None


def read_config(model: str) -> Any:
    """The configuration of a folder or hub name, for a class that can be trained here.

    Raises:
        UsageError: It cannot be read, or describes another kind of model.
    """
    from transformers import AutoConfig
    from transformers import __version__ as version
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    check_config(model, "model")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        own = "trust_remote_code" in str(error)
        remedy = (
            "; it is never run here: use a checkpoint in the format of transformers (InternVL: -HF)"
            if own
            else ""
        )
        raise refuse(f"cannot load {model!r}: {first_line(error)}{remedy}") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise refuse(
            f"{model!r} is of the type {config.model_type!r}, which AutoModelForImageTextToText of transformers "
            f"{version} does not load"
        )
    if config.is_encoder_decoder:
        raise refuse(f"{model!r} ({config.model_type}) is an encoder-decoder, which is not supported")
    check_head(config)
    quantization.refuse_quantized(model, config)
    # transformers would silently ignore a damaged file, and with it the tokens that end responses.
    _read_json(model, "generation_config.json")
    return config


def load_frontend(model: str, config: Any = None) -> Frontend:
    """Read what is needed to make prompts for a folder or hub name.

    Args:
        model: The folder or name.
        config: Its configuration, if already read.

    Raises:
        UsageError: Something is missing; the message says what.
    """
    config = read_config(model) if config is None else config
    if find_family(config.model_type) is None:
        processor = load_processor(model, config.model_type)
        frontend = Frontend(config, processor.tokenizer, WHOLE_FRAMES, processor)
    else:
        frontend = Frontend(config, _load_tokenizer(model), read_patch_spec(model, config))
    if frontend.tokenizer.eos_token_id is None:
        raise refuse(f"{model!r} has a tokenizer without an eos_token, which answers end with")
    return frontend


def _load_tokenizer(model: str) -> Any:
    """The tokenizer of a model in the table of families, with a chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise refuse(f"cannot load {model!r}: {first_line(error)}") from error
    template = read_chat_template(model)
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise refuse(f"{model!r} has no chat template; use an instruct checkpoint")
    return tokenizer


def read_patch_spec(model: str, config: Any) -> PatchSpec:
    """Patch sizes from the model config, mean and standard deviation from its preprocessor file."""
    family = find_family(config.model_type)
    if family is None:
        raise refuse(f"{config.model_type!r} is not in the table of families")
    whole = _read_json(model, "processor_config.json") or {}
    video, image = (_read_json(model, name) for name in (VIDEO_SETTINGS, IMAGE_SETTINGS))
    for settings in (video, image, whole.get("video_processor"), whole.get("image_processor")):
        if settings and "image_mean" in settings:
            _check_scale(model, settings)
            return family.patch_spec(config, settings)
    raise RlaifFastError(
        f"model: {model!r} has no preprocessor_config.json or processor_config.json with image_mean and "
        "image_std; copy it from the checkpoint it was trained from"
    )


def _check_scale(model: str, settings: dict[str, Any]) -> None:
    """Refuse a processor that does not scale pixels to 0 .. 1 and then to a mean and deviation of each color."""
    for name in ("do_rescale", "do_normalize"):
        if settings.get(name) is False:
            raise refuse(f"{model!r}: its processor has {name}: false, which is not supported")
    factor = settings.get("rescale_factor") or 1 / 255
    if abs(255 * factor - 1) > 1e-3:
        raise refuse(f"{model!r}: its processor has rescale_factor {factor}, and 1/255 alone is supported")
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        if not isinstance(values, list) or len(values) != 3:
            raise refuse(
                f"{model!r}: its processor has {name} {values}, and a number for each of 3 colors is expected"
            )


def read_chat_template(model: str) -> str | None:
    """The chat template of a model's processor, which takes precedence over its tokenizer's: it may support media that
    the other does not. None without a separate one; chat_template.jinja serves both, and the tokenizer reads it.

    Raises:
        UsageError: It is not text.
    """
    for name in ("processor_config.json", "chat_template.json"):
        template = (_read_json(model, name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
        if template is not None:
            raise refuse(
                f"{model!r}: {name} has a chat_template that is no text; got {type(template).__name__}"
            )
    return None


def _read_json(model: str, name: str) -> dict | None:
    from transformers.utils import cached_file

    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"model: {model!r}: {name} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"model: {model!r}: {name} must hold a JSON object, got {type(values).__name__}")
    return values
