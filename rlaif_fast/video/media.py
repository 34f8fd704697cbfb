"""Media in the patch layout of a vision tower: what preprocessing makes and the policy reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Media:
    """One video or image in the model's patch layout.

    Attributes:
        patches: (n, C * temporal_patch * patch * patch), the rows of `pixel_values_videos`; a tower that takes whole
            frames has one row a frame.
        grid_thw: (t, h, w) in patches, before merging; n = t * h * w.
        is_video: Whether the prompt marks it by video tokens (else image tokens).
        seconds_per_grid: Seconds between two temporal patches.
        key: Content address; equal keys have equal patches, so one encoding serves all.
        timestamps: Seconds of each temporal patch (the mean of its first and last frame), for prompts that
            state them; empty for an image.
        kept: (features,) bool, which of its features the prompt holds; None for all.
    """

    patches: Tensor  # (n, D)
    grid_thw: tuple[int, int, int]
    is_video: bool
    seconds_per_grid: float
    key: str
    timestamps: tuple[float, ...] = ()
    kept: Tensor | None = None
