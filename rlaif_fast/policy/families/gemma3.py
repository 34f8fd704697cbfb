"""Gemma 3: a video is shown as its frames, each a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlaif_fast.policy.families.base import FrameFamily, unwrap
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec


class Gemma3(FrameFamily):
    """Whole frames; the tokens of a picture attend to each other in both directions."""

    name = "Gemma 3"
    model_types: tuple[str, ...] = ("gemma3",)
    two_way_pictures = True
    image_token = "<image_soft_token>"
    image_mark = video_mark = "<start_of_image>"
    turn_end = "<end_of_turn>"

    def tokens_a_frame(self, config: Any) -> int:
        """The number of tokens to which the projector pools a frame."""
        return config.mm_tokens_per_image

    def content(self, clip: Clip) -> dict[str, str]:
        """The template supports only pictures."""
        return {"type": "image"}

    def image_text(self, media: Media, spec: PatchSpec) -> str:
        """One picture between its marks and blank lines."""
        tokens = spec.tokens(media) // media.grid_thw[0]
        return f"\n\n<start_of_image>{self.image_token * tokens}<end_of_image>\n\n"

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """Its frames, one picture after the other."""
        return self.image_text(media, spec) * media.grid_thw[0]

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """Adds the types that tell which tokens attend in both directions; the model needs them in training."""
        types = (input_ids == unwrap(model).config.image_token_id).long()
        return super().plain_inputs(model, rows, input_ids) | {"token_type_ids": types}


FAMILIES = (Gemma3(),)
