"""Requests to an engine, in process and over HTTP alike: our own tokens and patches, not those of its processor.

An engine's own video processor would resize and sample frames again. Here it gets exactly what the policy reads, so
that the log-probabilities of both can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.video.media import Media

AS_FRAMES = ("qwen3_vl", "qwen3_vl_moe")  # each temporal patch has a block of its own
AS_VIDEOS = ("qwen2_5_vl",)
# Families whose log-probabilities were compared with the engine's. Qwen2.5-VL's are off by 3.6, and the guard says so.
COMPARED = ("qwen3_vl",)
LEAST_TEMPERATURE = 0.01  # vLLM raises a lower one to this
SEED_STEP = 1_000_003  # prompts apart, so that the responses of two never share a generator


@dataclass(frozen=True)
class MediaItem:
    """One block of media tokens of a prompt, and what the vision tower reads for it.

    Attributes:
        modality: "image" or "video", as the engine counts them.
        key: Content address; the engine encodes equal keys once.
        offset: Place of the first token of the block.
        length: Tokens of the block.
        grid_thw: (t, h, w) in patches.
        patches: (t * h * w, D).
        seconds_per_grid: Seconds between two temporal patches, where the positions follow them.
    """

    modality: str
    key: str
    offset: int
    length: int
    grid_thw: tuple[int, int, int]
    patches: Tensor  # (n, D)
    seconds_per_grid: float | None = None

    @property
    def fields(self) -> dict[str, Tensor]:
        """Its tensors, by the names that transformers gives them."""
        grid = torch.tensor([self.grid_thw])
        if self.modality == "image":
            return {"pixel_values": self.patches, "image_grid_thw": grid}
        fields = {"pixel_values_videos": self.patches, "video_grid_thw": grid}
        if self.seconds_per_grid is not None:
            fields["second_per_grid_ts"] = torch.tensor([self.seconds_per_grid])
        return fields


def check_model(policy: Policy) -> None:
    """Refuse a model whose media cannot be handed over.

    Raises:
        UsageError: The model's family is not supported; the message names those that are.
    """
    model_type = unwrap(policy.model).config.model_type
    if model_type not in COMPARED:
        raise UsageError(
            f"sampler: vllm draws for {', '.join(COMPARED)}, not for {model_type} (docs/engines.md)"
        )


def media_items(prompt: EncodedPrompt, config: Any) -> list[MediaItem]:
    """The media of a prompt in order of appearance.

    Qwen3-VL states the time of each temporal patch in front of it, so its tower and positions treat a temporal patch
    as an image; as images, each is one contiguous block.

    Args:
        prompt: The prompt.
        config: Of the model.

    Raises:
        UsageError: The prompt holds something that cannot be sent to an engine.
    """
    if prompt.inputs is not None or any(media.kept is not None for media in prompt.media):
        raise UsageError("sampler: vllm takes prompts of tokens and patches; these hold more")
    ids = prompt.input_ids.tolist()
    merged = config.vision_config.spatial_merge_size**2
    items: list[MediaItem] = []
    end = 0  # of the block before
    for media in prompt.media:
        token = config.video_token_id if media.is_video else config.image_token_id
        for part in _blocks(media, split=config.model_type in AS_FRAMES):
            t, h, w = part.grid_thw
            length = t * h * w // merged
            offset = ids.index(token, end)
            end = offset + length
            as_video = part.is_video and config.model_type in AS_VIDEOS
            items.append(
                MediaItem(
                    "video" if as_video else "image",
                    part.key,
                    offset,
                    length,
                    part.grid_thw,
                    part.patches.cpu(),
                    part.seconds_per_grid if as_video else None,
                )
            )
    return items


def by_modality(items: Sequence[MediaItem], part: Callable[[MediaItem], Any]) -> dict[str, list[Any]]:
    """A part of each medium, by modality, as an engine takes them."""
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(item.modality, []).append(part(item))
    return found


def _blocks(media: Media, *, split: bool) -> list[Media]:
    """The parts of a medium that are one block of tokens each: the whole, or with `split` each temporal patch."""
    t, h, w = media.grid_thw
    if not split or t == 1:
        return [media]
    return [
        Media(patches, (1, h, w), media.is_video, media.seconds_per_grid, f"{media.key}-{i}")
        for i, patches in enumerate(media.patches.split(h * w))
    ]


def sampling_options(policy: Policy, params: SamplingParams, num_generations: int) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams`, without the seed.

    Raises:
        UsageError: `max_reasoning_tokens`, which vLLM does not support, or a temperature that it would raise.
    """
    if 0 < params.temperature < LEAST_TEMPERATURE:
        raise UsageError(
            f"temperature: vllm draws at no less than {LEAST_TEMPERATURE} (or at 0), got {params.temperature}"
        )
    if params.max_reasoning_tokens is not None:
        raise UsageError(
            "max_reasoning_tokens: the vllm sampler does not bound the reasoning; use another one"
        )
    return {
        "n": num_generations,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": params.max_new_tokens,
        "min_tokens": params.min_new_tokens,
        "logprobs": 0,
        "stop_token_ids": list(policy.eos_token_ids),
        "allowed_token_ids": policy.token_ids_allowed.nonzero()[:, 0].tolist(),
        "detokenize": False,
    }


def seeds(params: SamplingParams, prompts: int) -> list[int]:
    """A seed for each prompt, whose responses count up from it; torch draws the first where `params` has no seed."""
    first = int(torch.randint(2**31, ())) if params.seed is None else params.seed
    return [(first * SEED_STEP + i) * SEED_STEP % 2**62 for i in range(prompts)]


def check_lengths(prompts: Sequence[EncodedPrompt], params: SamplingParams, max_model_len: int) -> None:
    """Refuse a prompt that leaves no room for a response.

    Raises:
        UsageError: The message names the option that makes room.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    if longest + params.max_new_tokens > max_model_len:
        raise UsageError(
            f"sampler_options: max_model_len {max_model_len} is too small for a prompt of {longest} tokens and "
            f"{params.max_new_tokens} new ones"
        )
