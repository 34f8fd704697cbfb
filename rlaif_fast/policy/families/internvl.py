"""InternVL 2.5, 3 and 3.5 in Hugging Face's format: whole frames, one line each."""

from __future__ import annotations

from typing import Any

from rlaif_fast.policy.families.base import FrameFamily
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec


class InternVL(FrameFamily):
    """Each frame is one tile; a picture is one tile too, as if `crop_to_patches` were off."""

    name = "InternVL"
    model_types: tuple[str, ...] = ("internvl",)
    image_token = "<IMG_CONTEXT>"
    image_mark = "<IMG_CONTEXT>"
    video_mark = "<video>"

    def tokens_a_frame(self, config: Any) -> int:
        """Patches of a frame after the pixel shuffle."""
        vision = config.vision_config
        height, width = (
            size // patch
            for size, patch in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)
        )
        return int(height * width * config.downsample_ratio**2)

    def image_text(self, media: Media, spec: PatchSpec) -> str:
        """One tile between its marks."""
        return f"<img>{self.image_token * spec.tokens(media)}</img>"

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """`Frame1: ` and so on, one line per frame."""
        frames = media.grid_thw[0]
        tile = f"<img>{self.image_token * (spec.tokens(media) // frames)}</img>"
        return "\n".join(f"Frame{number}: {tile}" for number in range(1, frames + 1))


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILIES = (InternVL(),)
