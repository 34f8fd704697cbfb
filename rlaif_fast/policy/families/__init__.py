"""The model families that the engine knows, one per file, and what it requires of a model of any of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import (
    gemma3,
    glm4v,
    internvl,
    llava_onevision,
    qwen_vl,
    smolvlm,
    video_llama_3,
)
from rlaif_fast.policy.families.base import IMAGE, TEXT, VIDEO, Family, unwrap
from rlaif_fast.policy.pattern import picture_runs
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.recent import RecentlyUsed

log = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "IMAGE",
    "TEXT",
    "VIDEO",
    "Family",
    "PromptLayout",
    "PromptLayouts",
    "eos_token_ids",
    "family_of",
    "find_family",
    "marker_token_ids",
    "refuse_far_positions",
    "text_decoder",
    "unwrap",
]

_FILES = (qwen_vl, glm4v, internvl, llava_onevision, smolvlm, video_llama_3, gemma3)
FAMILIES: dict[str, Family] = {
    model_type: family for file in _FILES for family in file.FAMILIES for model_type in family.model_types
}
LAYOUTS_KEPT = 512
MARKERS = tuple(
    f"{kind}_{role}"
    for kind in ("image", "video", "vision")
    for role in ("token_id", "start_token_id", "end_token_id")
)


def find_family(model_type: str) -> Family | None:
    """The family of a `config.model_type`; None if it is not in the table."""
    return FAMILIES.get(model_type)


def family_of(model: nn.Module) -> Family:
    """The family of a model that computes each prompt once per group.

    Raises:
        UsageError: The packed path does not know the model, or cannot run it.
    """
    config = unwrap(model).config
    check_shared_prefix(config)
    return FAMILIES[config.model_type]


def check_shared_prefix(config: Any) -> None:
    """Refuse a configuration whose model cannot compute each prompt once per group.

    Raises:
        UsageError: With the reason.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(f"{f.name} ({name})" for name, f in FAMILIES.items() if f.unshared is None)
        raise UsageError(
            f"shared_prefix: the model family {config.model_type!r} is not supported; supported: {known}; "
            "set shared_prefix: false to train it the plain way"
        )
    reason = family.refuses_shared_prefix(config)
    if reason is not None:
        raise UsageError(
            f"shared_prefix: {family.name} ({config.model_type}) is not supported: {reason}; "
            "set shared_prefix: false to train it the plain way"
        )


def text_decoder(model: nn.Module) -> Any:
    """The decoder: embeddings to normalised last hidden states."""
    whole = unwrap(model)
    return whole.get_submodule(FAMILIES[whole.config.model_type].decoder)


@dataclass(frozen=True)
class PromptLayout:
    """What the packed path needs to know of a prompt besides its tokens.

    Attributes:
        positions: (3, P) int64 position ids, as the model gives them to the prompt alone; equal rows for a model
            with one axis.
        next_position: Position of the first response token, the same on the three axes.
        media_index: (n,) int64 positions of the media tokens in the prompt, ascending.
        picture_runs: (P,) number of the run of media tokens that each token belongs to, -1 for text.
    """

    positions: np.ndarray  # (3, P)
    next_position: int
    media_index: np.ndarray  # (n,)
    picture_runs: np.ndarray  # (P,)


class PromptLayouts:
    """Layouts of prompts, cached by what they depend on: the places of media tokens, the grids, the seconds."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._model = model
        self._family = family
        self._known: RecentlyUsed[tuple, PromptLayout] = RecentlyUsed(LAYOUTS_KEPT)
        self._warned = False

    def __call__(self, prompt: EncodedPrompt) -> PromptLayout:
        ids = prompt.input_ids.numpy(force=True)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"prompt.input_ids: expected shape (P,) with P >= 1, got {tuple(ids.shape)}")
        types = self._family.token_types(unwrap(self._model).config, ids)
        media = tuple((m.grid_thw, m.is_video, m.seconds_per_grid) for m in prompt.media)
        key = (types.tobytes(), media)
        layout = self._known.get(key)
        if layout is None:
            layout = self._build(prompt, types)
            self._known.put(key, layout)
        return layout

    def _build(self, prompt: EncodedPrompt, types: np.ndarray) -> PromptLayout:
        self._check_counts(prompt, types)
        # The prompt and one more text token, whose position is where a response starts.
        positions = self._family.positions(self._model, prompt, types)
        self._check_reach(types.size, int(positions.max()))
        return PromptLayout(
            positions=np.ascontiguousarray(positions[:, :-1]),
            next_position=int(positions[0, -1]),
            media_index=np.flatnonzero(types != TEXT),
            picture_runs=picture_runs(types != TEXT),
        )

    def _check_reach(self, tokens: int, last: int) -> None:
        """Warn once that a prompt reaches positions that the model was not made for."""
        most = getattr(unwrap(self._model).config.get_text_config(), "max_position_embeddings", None)
        if most is not None and last >= most and not self._warned:
            self._warned = True
            log.warning(
                "a prompt of %d tokens takes positions up to %d, and the model is made for %d "
                "(max_position_embeddings): responses may be senseless; lower fps, max_frames or max_pixels",
                tokens,
                last,
                most,
            )

    def _check_counts(self, prompt: EncodedPrompt, types: np.ndarray) -> None:
        """Check that each kind of media has as many tokens as features; kinds that share a token count together."""
        family, config = self._family, unwrap(self._model).config
        counts = {kind: int((types == kind).sum()) for kind in (IMAGE, VIDEO)}
        kinds: dict[str, tuple[int, ...]] = {"image": (IMAGE,), "video": (VIDEO,)}
        if family.axes == 1:  # nothing else distinguishes them
            kinds = {"media": (IMAGE, VIDEO)}
        for name, members in kinds.items():
            chosen = [m for m in prompt.media if (VIDEO if m.is_video else IMAGE) in members]
            wanted = sum(family.count(config, m) for m in chosen)
            found = sum(counts[kind] for kind in members)
            if wanted != found:
                raise ValueError(
                    f"prompt: its {name} grids make {wanted} features, input_ids holds {found} tokens"
                )


def refuse_far_positions(config: Any, last: int) -> None:
    """Refuse positions beyond which the angles of all tokens depend on the longest sequence of a batch.

    Dynamic NTK and LongRoPE do this beyond the length that they start from: a response's log-probabilities would depend
    on the other prompts of its batch.

    Args:
        config: The model's configuration.
        last: The largest position of a batch.

    Raises:
        UsageError: `last` is such a position.
    """
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        kind = rope.get("rope_type")
        if kind in ("dynamic", "longrope"):
            most = rope.get("original_max_position_embeddings") if kind == "longrope" else None
            most = most or text.max_position_embeddings
            if last >= most:
                raise UsageError(
                    f"model: its positions are of the type {kind!r}, and behind {most} tokens they depend on the other "
                    f"prompts of a batch; this one reaches {last + 1}: lower fps, max_frames, max_pixels or "
                    "max_completion_length, or set rope_type: yarn in the model's config.json"
                )


def eos_token_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The tokens that end a response: those of `generate`, and the one that ends the answers taught by SFT."""
    whole = unwrap(model)
    configured = whole.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    turn_end = (find_family(whole.config.model_type) or Family()).turn_end
    known = tokenizer.get_vocab()
    taught = [known[turn_end]] if turn_end in known else []
    return tuple(dict.fromkeys([*ids, tokenizer.eos_token_id, *taught]))


def marker_token_ids(model: nn.Module) -> list[int]:
    """Tokens that represent media: a sampled one would ask for features that do not exist."""
    config = unwrap(model).config
    return [getattr(config, name) for name in MARKERS if isinstance(getattr(config, name, None), int)]
