"""SmolVLM2: whole frames, each with the minute and second it was taken at."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.policy.families.base import Features, FrameFamily
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.preprocess import PatchSpec

# fmt: off
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


class SmolVLM(FrameFamily):
    """A picture is one frame too, as if `do_image_splitting` were off."""

    name = "SmolVLM2"
    model_types: tuple[str, ...] = ("smolvlm",)
    tower = "model.vision_model"
    projector: tuple[str, ...] = ("model.connector",)
    decoder = "model.text_model"
    feature_parts: tuple[str, ...] = ("model.vision_model", "model.connector")
    image_token = image_mark = "<image>"
    video_mark = "<video>"

    def tokens_a_frame(self, config: Any) -> int:
        """Patches of a frame after the pixel shuffle."""
        vision = config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2

    def chat_template(self, tokenizer: Any, clips: Sequence[Clip]) -> str | None:
        """Its processor lays out videos with its own template."""
        if all(clip.is_image for clip in clips):
            return None
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        return DEFAULT_CHAT_TEMPLATE

    def image_text(self, media: Media, spec: PatchSpec) -> str:
        """One frame between its marks."""
        tokens = self.image_token * (spec.tokens(media) // media.grid_thw[0])
        return f"<fake_token_around_image><global-img>{tokens}<fake_token_around_image>"

    def video_text(self, clip: Clip, media: Media, spec: PatchSpec) -> str:
        """An introduction with the video's duration, then each frame after its time."""
        duration = timedelta(seconds=int(clip.seconds))
        frames = "".join(
            f"\nFrame from {int(seconds // 60):02d}:{int(seconds % 60):02d}:{self.image_text(media, spec)}"
            for seconds in clip.timestamps
        )
        count = in_words(media.grid_thw[0])
        return (
            f"You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
            f"{frames}\n\n"
        )

    def features(self, vision: Any, media: Sequence[Media]) -> list[Features]:
        """Features of each medium; the model takes the frames of one row as a row."""
        frames = self.frames(vision, media)
        found = torch.cat(list(vision.model.get_image_features(frames[None], return_dict=True).pooler_output))
        found = found.flatten(0, -2)
        per_frame = len(found) // len(frames)
        return [(part,) for part in found.split([per_frame * m.grid_thw[0] for m in media])]

    def plain_inputs(self, model: Any, rows: Sequence[EncodedPrompt], input_ids: Tensor) -> dict[str, Tensor]:
        """The frames of each row; rows with fewer are filled with zeros, which the model drops."""
        frames = {index: self.frames(model, row.media) for index, row in enumerate(rows) if row.media}
        if not frames:
            return {}
        some = next(iter(frames.values()))
        pixels = some.new_zeros(len(rows), max(map(len, frames.values())), *some.shape[1:])
        for index, own in frames.items():
            pixels[index, : len(own)] = own
        return {"pixel_values": pixels}


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in English words, as num2words writes it."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f"-{UNITS[rest]}" if rest else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{UNITS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if 0 < rest < 100 else ", "
    return f"{in_words(thousands)} thousand" + (f"{joint}{in_words(rest)}" if rest else "")


FAMILIES = (SmolVLM(),)
