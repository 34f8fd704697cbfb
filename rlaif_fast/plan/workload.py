"""The prompts that a process gets in a step: with the configured lengths, but no content."""

from __future__ import annotations

from typing import Any

import torch

from rlaif_fast.plan.options import PlanConfig
from rlaif_fast.policy.families import find_family
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video import FrameSampling
from rlaif_fast.video.base import VideoInfo
from rlaif_fast.video.media import Media

VIDEO_RATE = 30.0  # frames per second of the file
TIMESTAMP_TOKENS = 6  # of "<12.5 seconds>"
WORD = 16  # a token that is no medium


def prompts_of_a_process(config: PlanConfig, model: Any) -> list[EncodedPrompt]:
    """The prompts of the process with the most to do.

    Args:
        config: Says how many questions and videos there are, and how videos become frames.
        model: The model's configuration.
    """
    videos = -(-config.videos_per_step // config.gpus)
    prompts = []
    for place in range(videos):
        ids, media = video_tokens(config, model, f"video {place}")
        for question in range(min(config.questions, config.questions_per_video)):
            text = [WORD + question] + [0] * (config.question_tokens - 1)
            prompts.append(EncodedPrompt(torch.tensor(ids + text), (media,)))
    return prompts


def video_tokens(config: PlanConfig, model: Any, key: str) -> tuple[list[int], Media]:
    """The tokens of a video, and its patches on the meta device."""
    family = find_family(model.model_type)
    assert family is not None
    spec = family.patch_spec(model, {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3})
    frames = max(1, round(config.video_seconds * VIDEO_RATE))
    info = VideoInfo(
        key, "", config.video_width, config.video_height, frames, VIDEO_RATE, config.video_seconds, ()
    )
    sampling = FrameSampling(
        fps=config.fps,
        nframes=config.nframes,
        min_frames=config.min_frames,
        max_frames=config.max_frames,
        frame_factor=spec.temporal_patch_size,
    )
    count = len(sampling.sample(info)[0])
    budget = spec.budget(config.min_pixels, config.max_pixels, config.total_pixels)
    height, width = budget.size(key, count, config.video_height, config.video_width)
    grid = (count // spec.temporal_patch_size, height // spec.patch_size, width // spec.patch_size)
    patches = torch.empty(
        grid[0] * grid[1] * grid[2], 3 * spec.temporal_patch_size * spec.patch_size**2, device="meta"
    )
    media = Media(patches, grid, True, config.video_seconds / grid[0], key)
    tokens = grid[1] * grid[2] // spec.merge_size**2
    start, pad, end = model.vision_start_token_id, model.video_token_id, model.vision_end_token_id
    if model.model_type == "qwen3_vl":
        return ([0] * TIMESTAMP_TOKENS + [start] + [pad] * tokens + [end]) * grid[0], media
    return [start, *[pad] * (tokens * grid[0]), end], media
