"""Prompts of a model outside the table of families, made by its own Hugging Face processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.policy.families import Family
from rlaif_fast.prompts.encoder import Prompt, PromptEncoder, question_text
from rlaif_fast.recent import RecentlyUsed
from rlaif_fast.video import PatchSpec, PixelBudget
from rlaif_fast.video.base import Clip

CACHED_BYTES = 1 << 30


class ProcessorEncoder(PromptEncoder):
    """Encodes prompts through a Hugging Face processor, and answers as `PromptEncoder` does.

    Frames are sampled and bounded here (`fps`, `max_pixels`); the processor resizes and cuts them as it likes.

    Args:
        processor: The model's processor, with a tokenizer and a chat template.
        model_type: `config.model_type` of the model.
        pixels: Bounds on the frames that the processor gets.
        system_prompt: Used if the row has none.
    """

    def __init__(
        self, processor: Any, model_type: str, pixels: PixelBudget, *, system_prompt: str | None = None
    ) -> None:
        super().__init__(
            processor.tokenizer, model_type, PatchSpec(1, 1, 1), pixels, system_prompt=system_prompt
        )
        self.processor = processor
        self._prompts: RecentlyUsed[tuple, Prompt] = RecentlyUsed(CACHED_BYTES, _bytes, at_least=1)

    def _family(self, model_type: str) -> Family:
        return Family()

    def encode(self, example: Example, clips: Sequence[Clip]) -> Prompt:
        """Encode one prompt; see `PromptEncoder.encode`.

        Raises:
            UsageError: The processor refuses it.
        """
        text = (question_text(example), *example.options, example.system or "", *example.layout)
        key = (*text, *(clip.key for clip in clips))
        known = self._prompts.get(key)
        if known is None:
            known = self._run(example, clips)
            self._prompts.put(key, known)
        return Prompt(input_ids=known.input_ids, inputs=known.inputs, example=example, clips=tuple(clips))

    def _apply_template(self, messages: list[dict], clips: Sequence[Clip]) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _run(self, example: Example, clips: Sequence[Clip]) -> Prompt:
        videos = [clip for clip in clips if not clip.is_image]
        pictures = [clip.frames[0].permute(2, 0, 1) for clip in clips if clip.is_image]
        media: dict[str, Any] = {}
        if pictures:
            media["images"] = [picture.cpu().numpy() for picture in pictures]
        if videos:
            media["videos"] = [clip.frames.permute(0, 3, 1, 2).cpu() for clip in videos]
            media["video_metadata"] = [_metadata(clip) for clip in videos]
            media["do_sample_frames"] = False
        text = self._render(example, clips)
        try:
            made = dict(self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **media))
        except Exception as error:  # a processor raises whatever it likes
            raise UsageError(
                f"{example.source or example.id}: the processor {type(self.processor).__name__} refuses the prompt: "
                f"{first_line(error)}"
            ) from error
        ids = made.pop("input_ids")[0]
        made.pop("attention_mask", None)
        made = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        return Prompt(input_ids=ids, inputs=made, example=example)


def _metadata(clip: Clip) -> Any:
    """Metadata for a processor: the frames come from a video with one frame per millisecond, so that the processor
    writes their actual times."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=round(1000 * clip.seconds),
        fps=1000.0,
        frames_indices=[round(1000 * seconds) for seconds in clip.timestamps],
        duration=clip.seconds,
    )


def _bytes(prompt: Prompt) -> int:
    return sum(value.nbytes for value in (prompt.inputs or {}).values())
