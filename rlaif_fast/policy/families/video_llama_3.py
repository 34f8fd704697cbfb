"""VideoLLaMA3: patches and grids, plain positions, and tokens dropped if a frame repeats the previous one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.policy.families.base import (
    DECODERS,
    Family,
    Features,
    VisionParts,
    patches_for,
    unwrap,
)
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec


class VideoLlama3(Family):
    """Videos only: a picture has a different number of patches per token than a video."""

    name = "VideoLLaMA3"
    model_types: tuple[str, ...] = ("video_llama_3",)
    tower = "model.vision_model"
    projector: tuple[str, ...] = ("model.projector",)
    decoders = DECODERS
    axes = 1
    pictures = False
    video_mark = "<|video_pad|>"
    image_mark = "<|image_pad|>"

    def patch_spec(self, config: Any, settings: Mapping[str, Any]) -> PatchSpec:
        """Single frames; the processor says how many patches make a token."""
        return PatchSpec(
            patch_size=config.vision_config.patch_size,
            temporal_patch_size=1,
            merge_size=settings.get("merge_size", 2),
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            kept="all" if settings.get("use_token_compression", True) is False else "changed",
        )

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """`Time 1.5s:` before each frame's tokens."""
        frames = media.grid_thw[0]
        counts = _kept(media).view(frames, -1).sum(1).tolist()
        return ",".join(
            f"Time {seconds:.1f}s:{self.video_mark * count}"
            for seconds, count in zip(clip.timestamps, counts)
        )

    def vision(self, model: Any) -> VisionParts:
        """Tower and projector."""
        whole = unwrap(model)
        return VisionParts(whole, [whole.model.vision_model, whole.model.projector])

    def features(self, vision: Any, media: Sequence[Media]) -> list[Features]:
        """Features of each video by the model's own `get_video_features`, without the dropped ones."""
        found = vision.model.get_video_features(**self._pixels(vision, media), return_dict=True).pooler_output
        return [(part[_kept(m).to(part.device)],) for part, m in zip(found, media)]

    def count(self, config: Any, media: Media) -> int:
        """Features that are kept."""
        return int(_kept(media).sum())

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """With the mask of the tokens that are kept."""
        media = [m for row in rows for m in row.media]
        if not media:
            return {}
        inputs = self._pixels(model, media)
        kept = torch.cat([_kept(m) for m in media])
        return inputs | {"video_compression_mask": kept.to(inputs["video_grid_thw"].device)}

    def _pixels(self, module: Any, media: Sequence[Media]) -> dict[str, Tensor]:
        patches = patches_for(module, media)
        merge = math.isqrt(len(media[0].patches) // len(_kept(media[0])))
        return {
            "pixel_values_videos": patches,
            "video_grid_thw": torch.tensor([m.grid_thw for m in media], device=patches.device),
            "video_merge_sizes": torch.full((len(media),), merge, device=patches.device),
        }


def _kept(media: Media) -> Tensor:
    assert media.kept is not None, "PatchSpec.kept is set for this family"
    return media.kept


FAMILIES = (VideoLlama3(),)
