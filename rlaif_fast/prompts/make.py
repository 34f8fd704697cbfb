"""Makes the encoder of a model, and tries one prompt before any weights are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.policy.families import IMAGE, VIDEO, find_family
from rlaif_fast.policy.families.base import refuse
from rlaif_fast.policy.frontend import Frontend
from rlaif_fast.policy.loading import LoadedModel
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.prompts.processor import ProcessorEncoder
from rlaif_fast.video import PixelBudget
from rlaif_fast.video.base import Clip

TRIAL_FRAMES, TRIAL_SIDE, TRIAL_PIXELS = 4, 64, 128 * 128


def make_encoder(
    loaded: LoadedModel | Frontend, pixels: PixelBudget, *, system_prompt: str | None = None, **patches: Any
) -> PromptEncoder:
    """The encoder for a model: by the table of families, or through its own processor.

    Args:
        loaded: The model, or only its frontend.
        pixels: Bounds on the media's size.
        system_prompt: As for `PromptEncoder`.
        **patches: `device`, `dtype` and `patchify` of `PromptEncoder`; a model's own processor ignores them.
    """
    model_type = loaded.model_type if isinstance(loaded, LoadedModel) else loaded.config.model_type
    if loaded.processor is not None:
        return ProcessorEncoder(loaded.processor, model_type, pixels, system_prompt=system_prompt)
    return PromptEncoder(
        loaded.tokenizer, model_type, loaded.patch_spec, pixels, system_prompt=system_prompt, **patches
    )


def trial_clip() -> Clip:
    """A generated clip of four frames in two seconds."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (TRIAL_FRAMES, TRIAL_SIDE, TRIAL_SIDE, 3), generator=generator)
    times = tuple(0.5 * index for index in range(TRIAL_FRAMES))
    return Clip(frames.to(torch.uint8), times, key="trial", path="a generated clip", sample_fps=2.0)


def check_encoding(frontend: Frontend, system_prompt: str | None = None) -> int:
    """Encode a question about a generated clip; returns the number of tokens in the prompt.

    Raises:
        UsageError: Template, tokenizer or processor do not lay out a video as the model needs.
    """
    spec, config = frontend.patch_spec, frontend.config
    side = spec.factor
    pixels = spec.budget(side * side, max(side * side, TRIAL_PIXELS))
    encoder = make_encoder(frontend, pixels, system_prompt=system_prompt)
    example = Example(id="trial", question="What happens?", media=())
    try:
        prompt = encoder.encode(example, [trial_clip()])
        answer = encoder.encode_answer("Nothing.")
    except UsageError as error:
        raise refuse(f"a prompt about a clip cannot be made for {config.model_type}: {error}") from error
    except Exception as error:  # templates and tokenizers raise whatever they like
        raise refuse(
            f"a prompt about a clip cannot be made for {config.model_type}: {first_line(error)}"
        ) from error
    last = max([*prompt.input_ids.tolist(), *answer])
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and last >= rows:
        token = frontend.tokenizer.convert_ids_to_tokens(last)
        raise refuse(
            f"{config.model_type}: a prompt holds {token!r}, the token {last}, and the model has {rows}; its tokenizer "
            "has more than its embedding"
        )
    family = find_family(config.model_type)
    if family is not None:
        types = family.token_types(config, prompt.input_ids.numpy())
        found = int(np.isin(types, (IMAGE, VIDEO)).sum())
        wanted = sum(family.count(config, media) for media in prompt.media)
        if found != wanted:
            raise refuse(
                f"{config.model_type}: a clip of {wanted} features became {found} media tokens; the tokenizer or the "
                "chat template is of another model"
            )
    return len(prompt.input_ids)
