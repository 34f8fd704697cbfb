"""LLaVA-OneVision: whole frames, pooled two by two, and one newline after a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlaif_fast.policy.families.base import Features, FrameFamily, VisionParts, refuse, unwrap
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec


class LlavaOnevision(FrameFamily):
    """Videos only: its pictures are cut into tiles of many sizes."""

    name = "LLaVA-OneVision"
    model_types: tuple[str, ...] = ("llava_onevision",)
    projector: tuple[str, ...] = ("model.multi_modal_projector", "model.image_newline")
    pictures = False
    image_token = video_mark = "<video>"
    image_mark = "<image>"

    def tokens_a_frame(self, config: Any) -> int:
        """Patches of a frame, halved along both sides."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        return math.ceil(side / 2) ** 2

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """All frames in one run, and the newline."""
        return self.image_token * (spec.tokens(media) + 1)

    def count(self, config: Any, media: Media) -> int:
        """The frames' features and the newline."""
        return super().count(config, media) + 1

    def vision(self, model: nn.Module) -> VisionParts:
        """Tower, projector and the newline's embedding."""
        whole = unwrap(model)
        parts = [whole.get_submodule(part) for part in self.feature_parts]
        return VisionParts(whole, parts, [whole.model.image_newline])

    def features(self, vision: Any, media: Sequence[Media]) -> list[Features]:
        """Features of each video by the model's own `get_video_features`, which gets all frames as one video."""
        frames = self.frames(vision, media)[None]
        found = vision.model.get_video_features(frames, return_dict=True).pooler_output[0]
        each = self.tokens_a_frame(vision.model.config)
        newline = vision.model.image_newline[None].to(found)
        # Some releases of transformers add a newline after all of it.
        videos = found[: each * frames.shape[1]].split([each * m.grid_thw[0] for m in media])
        return [(torch.cat((video, newline)),) for video in videos]

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """Videos of equally many frames, since the model takes them as one tensor."""
        media = [m for row in rows for m in row.media]
        if not media:
            return {}
        counts = {m.grid_thw[0] for m in media}
        if len(counts) > 1:
            raise refuse(
                f"{self.name}: its own forward takes videos of one number of frames, got {sorted(counts)}; set "
                "nframes, or shared_prefix: true"
            )
        frames = self.frames(model, media)
        return {"pixel_values_videos": frames.unflatten(0, (len(media), -1))}


FAMILIES = (LlavaOnevision(),)
