"""From a dataset row and its clips to the token ids and patches the policy reads.

The text follows the model's own chat template; each media placeholder is then expanded to as many media tokens as the
vision tower emits, the way the Hugging Face processor of the family does it (Qwen3-VL: one timestamp and one vision
block per temporal patch; Qwen2.5-VL: one block a video).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlaif_fast.data.schema import Example, option_letters
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.video import PatchSpec, PixelBudget, grid_timestamps, preprocess
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media

VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
CACHED_PROMPTS = 16384  # token ids only: a few kilobytes each


@dataclass(frozen=True, kw_only=True)
class Prompt(EncodedPrompt):
    """An encoded prompt with what it was made from.

    Attributes:
        example: What is asked.
        clips: The decoded media of the example.
    """

    example: Example
    clips: tuple[Clip, ...] = ()


def question_text(example: Example) -> str:
    """The user's turn: the question, then the options with their letters."""
    if not example.options:
        return example.question
    letters = option_letters(len(example.options))
    choices = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, example.options))
    return f"{example.question}\n{choices}"


class PromptEncoder:
    """Encodes prompts and answers for one model.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        model_type: `config.model_type` of the model.
        patch_spec: Patch sizes and normalisation of its vision tower.
        pixels: Bounds on the media's size.
        system_prompt: Used where the row brings none; None leaves the system turn to the template.
        cache_bytes: Budget for patches kept, so that questions about a clip, and later epochs, share one preprocessing.
        device: Where patches are made and stay; None for where the frames are.
        dtype: Of the patches.
        patchify: Backend that makes them: "auto", "triton", "torch" or "reference".
    """

    def __init__(
        self,
        tokenizer,
        model_type: str,
        patch_spec: PatchSpec,
        pixels: PixelBudget,
        *,
        system_prompt: str | None = None,
        cache_bytes: int = 1 << 30,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        patchify: str = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self.timestamped = model_type.startswith("qwen3_vl")
        self.patch_spec = patch_spec
        self.pixels = pixels
        self.system_prompt = system_prompt
        self.device, self.dtype, self.patchify = device, dtype, patchify
        self._cache_bytes = cache_bytes
        self._held_bytes = 0
        self._media: OrderedDict[tuple[str, int], Media] = OrderedDict()
        self._ids: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._special = [token for token in tokenizer.all_special_tokens if token]

    def encode(self, example: Example, clips: Sequence[Clip]) -> Prompt:
        """Encode one prompt.

        Args:
            example: The row; its question and options are plain text (special tokens in them are removed).
            clips: Its decoded media, videos first, then images, as in the row.

        Raises:
            UsageError: The row names no media where the template needs some, or the prompt has no text.
        """
        media = tuple(self._preprocess(clip, len(clips)) for clip in clips)
        key = (example.question, *example.options, example.system or "", *(clip.key for clip in clips))
        ids = self._ids.get(key)
        if ids is None:
            ids = self._ids[key] = self._encode(example, clips, media)
        self._ids.move_to_end(key)
        if len(self._ids) > CACHED_PROMPTS:
            self._ids.popitem(last=False)
        return Prompt(input_ids=ids, media=media, example=example, clips=tuple(clips))

    def _encode(self, example: Example, clips: Sequence[Clip], media: Sequence[Media]) -> Tensor:
        content: list[dict[str, str]] = [{"type": "image" if clip.is_image else "video"} for clip in clips]
        content.append({"type": "text", "text": self._plain(question_text(example))})
        messages: list[dict] = [{"role": "user", "content": content}]
        system = example.system or self.system_prompt
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._plain(system)}]})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for clip, item in zip(clips, media):
            block = IMAGE_BLOCK if clip.is_image else VIDEO_BLOCK
            if block not in text:
                raise UsageError(
                    f"{example.source or example.id}: the chat template of this model leaves out a "
                    f"{'picture' if clip.is_image else 'video'}; use a model with a vision chat template"
                )
            text = text.replace(block, self._expand(clip, item).replace("<|", "<\0|"), 1)
        ids = self.tokenizer(text.replace("<\0|", "<|"), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, the end-of-sequence token last."""
        ids = self.tokenizer(self._plain(answer), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def _expand(self, clip: Clip, media: Media) -> str:
        t, h, w = media.grid_thw
        tokens = h * w // self.patch_spec.merge_size**2  # in one temporal patch
        if clip.is_image:
            return f"<|vision_start|>{'<|image_pad|>' * (t * tokens)}<|vision_end|>"
        if not self.timestamped:
            return f"<|vision_start|>{'<|video_pad|>' * (t * tokens)}<|vision_end|>"
        return "".join(
            f"<{seconds:.1f} seconds><|vision_start|>{'<|video_pad|>' * tokens}<|vision_end|>"
            for seconds in grid_timestamps(clip.timestamps, self.patch_spec.temporal_patch_size)
        )

    def _preprocess(self, clip: Clip, share: int) -> Media:
        key = (clip.key, share)
        media = self._media.get(key)
        if media is None:
            total = self.pixels.total_pixels
            media = preprocess(
                clip,
                self.patch_spec,
                min_pixels=self.pixels.min_pixels,
                max_pixels=self.pixels.max_pixels,
                total_pixels=None if total is None else total // share,
                device=self.device,
                dtype=self.dtype,
                backend=self.patchify,
            )
            self._media[key] = media
            self._held_bytes += media.patches.nbytes
            while self._held_bytes > self._cache_bytes and len(self._media) > 1:
                self._held_bytes -= self._media.popitem(last=False)[1].patches.nbytes
        else:
            self._media.move_to_end(key)
        return media

    def _plain(self, text: str) -> str:
        """`text` without special tokens: a question or an answer is data, never markup."""
        while any(token in text for token in self._special):
            for token in self._special:
                text = text.replace(token, " ")
        return text
