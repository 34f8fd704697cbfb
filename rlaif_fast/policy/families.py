"""The model families that the shared-prefix path knows, and the parts of their Hugging Face classes it uses.

No model code is forked: a family names the submodules (vision tower, text decoder, head) and says how
position ids of a prompt are made, always by the model's own `get_rope_index`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.prompt import EncodedPrompt

TEXT, IMAGE, VIDEO = 0, 1, 2  # token types, as `mm_token_type_ids` numbers them


@dataclass(frozen=True)
class Family:
    """One family of Video-LLMs.

    Attributes:
        name: Its usual name.
        model_type: `config.model_type` of its Hugging Face class.
        timed_positions: Whether the temporal position of a video token depends on `seconds_per_grid`.
    """

    name: str
    model_type: str
    timed_positions: bool


FAMILIES = {
    family.model_type: family
    for family in (
        Family("Qwen2.5-VL", "qwen2_5_vl", timed_positions=True),
        Family("Qwen3-VL", "qwen3_vl", timed_positions=False),
    )
}


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: nn.Module) -> Family:
    """The family of `model`.

    Raises:
        UsageError: The packed path does not know the model.
    """
    config = unwrap(model).config
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(f"{f.name} ({f.model_type})" for f in FAMILIES.values())
        raise UsageError(
            f"shared_prefix: the model family {config.model_type!r} is not supported; supported: {known}; "
            "set shared_prefix: false to train it the plain way"
        )
    layer_types = getattr(config.text_config, "layer_types", None) or ()
    if "sliding_attention" in layer_types:
        raise UsageError(
            f"shared_prefix: {family.name} with sliding-window attention layers is not supported; "
            "set shared_prefix: false to train it the plain way"
        )
    if getattr(config.text_config, "attention_dropout", 0.0):
        raise UsageError(
            f"shared_prefix: {family.name} with attention_dropout is not supported; set it to 0 in the model's "
            "config.json, or set shared_prefix: false to train it the plain way"
        )
    return family


def vision_tower(model: nn.Module) -> Any:
    """The vision tower, projector included."""
    return unwrap(model).model.visual


def text_decoder(model: nn.Module) -> Any:
    """The decoder: embeddings to normalised last hidden states."""
    return unwrap(model).model.language_model


def token_types(model: nn.Module, input_ids: np.ndarray) -> np.ndarray:
    """`mm_token_type_ids` of one prompt: 0 text, 1 image, 2 video."""
    config = unwrap(model).config
    return np.where(
        input_ids == config.image_token_id, IMAGE, np.where(input_ids == config.video_token_id, VIDEO, TEXT)
    )


@dataclass(frozen=True)
class PromptLayout:
    """What the packed path needs to know of one prompt besides its tokens.

    Attributes:
        positions: (3, P) int64 position ids, as the model gives them to the prompt alone.
        next_position: Position of the first response token, the same on the three axes.
        media_index: (n,) int64 positions of the media tokens in the prompt, ascending.
    """

    positions: np.ndarray  # (3, P)
    next_position: int
    media_index: np.ndarray  # (n,)


class PromptLayouts:
    """Layouts of prompts, remembered by what they depend on: where the media tokens are, the grids, the
    seconds.
    """

    def __init__(self, model: nn.Module, family: Family, size: int = 512) -> None:
        self._model = model
        self._family = family
        self._size = size
        self._known: OrderedDict[tuple, PromptLayout] = OrderedDict()

    def __call__(self, prompt: EncodedPrompt) -> PromptLayout:
        ids = prompt.input_ids.numpy(force=True)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"prompt.input_ids: expected shape (P,) with P >= 1, got {tuple(ids.shape)}")
        types = token_types(self._model, ids)
        media = tuple((m.grid_thw, m.is_video, m.seconds_per_grid) for m in prompt.media)
        key = (types.tobytes(), media)
        layout = self._known.get(key)
        if layout is None:
            layout = self._known[key] = self._build(prompt, types)
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return layout

    def _build(self, prompt: EncodedPrompt, types: np.ndarray) -> PromptLayout:
        media_index = np.flatnonzero(types != TEXT)
        merge = unwrap(self._model).config.vision_config.spatial_merge_size ** 2
        for kind, name in ((IMAGE, "image"), (VIDEO, "video")):
            wanted = sum(
                int(np.prod(m.grid_thw)) // merge for m in prompt.media if m.is_video == (kind == VIDEO)
            )
            found = int((types == kind).sum())
            if wanted != found:
                raise ValueError(
                    f"prompt: its {name} grids make {wanted} features, input_ids holds {found} tokens"
                )
        # One text token more than the prompt: its position is where a response starts.
        length = types.size + 1
        if not prompt.media:
            positions = np.broadcast_to(np.arange(length), (3, length))
        else:
            grids = {
                kind: torch.tensor([m.grid_thw for m in prompt.media if m.is_video == (kind == VIDEO)])
                for kind in (IMAGE, VIDEO)
            }
            options = {}
            if self._family.timed_positions:
                options["second_per_grid_ts"] = torch.tensor(
                    [m.seconds_per_grid for m in prompt.media if m.is_video], dtype=torch.float32
                )
            found, _ = unwrap(self._model).model.get_rope_index(
                torch.zeros(1, length, dtype=torch.int64),
                mm_token_type_ids=torch.from_numpy(np.append(types, TEXT)).int()[None],
                image_grid_thw=grids[IMAGE] if len(grids[IMAGE]) else None,
                video_grid_thw=grids[VIDEO] if len(grids[VIDEO]) else None,
                **options,
            )
            positions = found[:, 0].numpy()
        return PromptLayout(
            positions=np.ascontiguousarray(positions[:, :-1]),
            next_position=int(positions[0, -1]),
            media_index=media_index,
        )


def eos_token_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The tokens that end a response: those of `generate`, and the one that taught answers end with."""
    configured = unwrap(model).generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(dict.fromkeys([*ids, tokenizer.eos_token_id]))


def marker_token_ids(model: nn.Module) -> list[int]:
    """Tokens that stand for media: a sampled one would ask for features that are not there."""
    config = unwrap(model).config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(config, name) for name in names if getattr(config, name, None) is not None]
