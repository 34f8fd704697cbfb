"""GLM-4.1V, GLM-4.5V and GLM-4.6V: a video is a row of pictures with their seconds, between its own two marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.policy.families.base import (
    ATTENTION,
    IMAGE,
    TEXT,
    VIDEO,
    Family,
    Features,
    patches_for,
    refuse,
    unwrap,
)
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec


class Glm4v(Family):
    """GLM-4.1V and GLM-4.5V: whole seconds. Frames of a video are image tokens between the marks of a video."""

    name = "GLM-4.1V and GLM-4.5V"
    model_types: tuple[str, ...] = ("glm4v", "glm4v_moe")
    projector: tuple[str, ...] = ("model.visual.merger", "model.visual.downsample")
    # gate and up are one linear layer here
    lora_targets: tuple[str, ...] = (*ATTENTION, "gate_up_proj", "down_proj")
    video_mark = "<|begin_of_video|><|video|><|end_of_video|>"
    image_mark = "<|begin_of_image|><|image|><|end_of_image|>"

    def image_text(self, media: Media, spec: PatchSpec) -> str:
        """One block of image tokens."""
        return self.image_mark.replace("<|image|>", "<|image|>" * spec.tokens(media))

    def seconds_text(self, seconds: float) -> str:
        """How the time of a temporal patch is written."""
        return str(int(seconds))

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """A picture and the seconds of its first frame for each temporal patch."""
        block = self.image_mark.replace("<|image|>", "<|image|>" * (spec.tokens(media) // media.grid_thw[0]))
        times = clip.timestamps[:: spec.temporal_patch_size]
        frames = "".join(block + self.seconds_text(seconds) for seconds in times)
        return self.video_mark.replace("<|video|>", frames)

    def token_types(self, config: Any, input_ids: np.ndarray) -> np.ndarray:
        """Image tokens between the marks of a video are the video's."""
        opened = np.cumsum(input_ids == config.video_start_token_id)
        closed = np.cumsum(input_ids == config.video_end_token_id)
        kind = np.where(opened > closed, VIDEO, IMAGE)
        return np.where(input_ids == config.image_token_id, kind, TEXT)

    def features(self, vision: Any, media: Sequence[Media]) -> list[Features]:
        """The tower sees each temporal patch as a separate picture, as the model passes them."""
        patches = patches_for(vision, media)
        grids = [[1, *m.grid_thw[1:]] for m in media for _ in range(m.grid_thw[0])]
        grid_thw = torch.tensor(grids, device=patches.device)
        output = vision(patches, grid_thw=grid_thw, return_dict=True).pooler_output
        merge = len(patches) // len(output)
        return [(part,) for part in output.split([int(np.prod(m.grid_thw)) // merge for m in media])]

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """As the model accepts them: one kind of media per batch."""
        kinds = {m.is_video for row in rows for m in row.media}
        if len(kinds) > 1:
            raise refuse(
                f"{unwrap(model).config.model_type}: pictures and videos in one batch need the shared prefix; "
                "set shared_prefix: true"
            )
        return super().plain_inputs(model, rows, input_ids)


class Glm46V(Glm4v):
    """GLM-4.6V: seconds with a tenth."""

    name = "GLM-4.6V"
    model_types: tuple[str, ...] = ("glm46v",)

    def seconds_text(self, seconds: float) -> str:
        """How the time of a temporal patch is written."""
        return f"{seconds:.1f} seconds"


FAMILIES = (Glm4v(), Glm46V())
