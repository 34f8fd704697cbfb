"""From a dataset row and its clips to the token ids and patches the policy reads.

The text follows the model's own chat template; each media placeholder is then expanded to as many media tokens as the
vision tower emits, as the family's Hugging Face processor does it (`policy/families`). If the template leaves the
prompt inside the reasoning, the answer follows the reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from rlaif_fast.data.schema import Example, lettered
from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.policy.families import Family, find_family
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.vocabulary import CLOSES, OPENS, THINKING
from rlaif_fast.recent import RecentlyUsed
from rlaif_fast.video import PatchSpec, PixelBudget, preprocess
from rlaif_fast.video.base import Clip
from rlaif_fast.video.media import Media
from rlaif_fast.video.refs import Cut

CACHED_IDS_BYTES = 256 << 20  # 8 bytes per token: a prompt about a long video takes 100 kB


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
    """The user's turn without the media: the question, then the options with their letters."""
    return with_options(example.question, example.options) if example.asked is None else example.asked


def with_options(text: str, options: Sequence[str]) -> str:
    """`text`, then the options with their letters, one per line."""
    if not options:
        return text
    return "\n".join([text, *lettered(options)] if text else lettered(options))


def markup_of(tokenizer) -> set[str]:
    """Every token that the tokenizer reads as a mark: special tokens, and added ones for roles, tools and media.

    Added tokens that are plain words are not marks.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)} | set(
        tokenizer.all_special_tokens
    )
    others = {str(token) for token in added if re.search(r"[^\w\s]", str(token))}
    return {token for token in special | others if token.strip()}


def _any_of(marks: set[str]) -> re.Pattern[str]:
    """Matches any of `marks`, the longest first, since one may be part of another."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")


def _squeezed(text: str) -> str:
    """`text` without blanks, which templates add and strip."""
    return "".join(text.split())


def ends_in_reasoning(prompt: str) -> bool:
    """Whether a prompt opens the reasoning and leaves it open."""
    return prompt.rfind(OPENS) > prompt.rfind(CLOSES)


class PromptEncoder:
    """Encodes prompts and answers for one model.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        model_type: `config.model_type` of the model.
        patch_spec: Patch sizes and normalisation of its vision tower.
        pixels: Bounds on the media's size.
        system_prompt: Used as it is if the row has none; None leaves the system turn to the template.
        cache_bytes: Budget for cached patches, so that questions about a clip, and later epochs, share preprocessing.
        device: Where patches are made and kept; None for the device of the frames.
        dtype: Dtype of the patches.
        patchify: Backend that makes them: "auto", "triton", "torch" or "reference".

    Raises:
        UsageError: The family is not in the table, or `system_prompt` holds a mark of the tokenizer other than those
            of reasoning.
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
        self.family = self._family(model_type)
        self.patch_spec = patch_spec
        self.pixels = pixels
        self.system_prompt = system_prompt
        self.device, self.dtype, self.patchify = device, dtype, patchify
        self._media: RecentlyUsed[tuple[str, int, PixelBudget], Media] = RecentlyUsed(
            cache_bytes, lambda media: media.patches.nbytes, at_least=1
        )
        self._ids: RecentlyUsed[tuple[str, ...], Tensor] = RecentlyUsed(
            CACHED_IDS_BYTES, lambda ids: ids.nbytes
        )
        marks = markup_of(tokenizer)
        self._markup = _any_of(marks)
        # An answer may contain reasoning; a question must not put any into the policy's mouth.
        self._markup_in_answers = _any_of(marks - THINKING)
        mark = self._markup_in_answers.search(system_prompt or "")
        if mark is not None:
            raise UsageError(f"system_prompt: expected plain text, got the mark {mark[0]} of the tokenizer")
        self._marks = _any_of({self.family.video_mark, self.family.image_mark})

    def _family(self, model_type: str) -> Family:
        family = find_family(model_type)
        if family is None:
            raise UsageError(f"model: {model_type!r} has no prompt layout here; use ProcessorEncoder for it")
        return family

    @cached_property
    def reasons(self) -> bool:
        """Whether the template leaves a prompt inside the reasoning, so that an answer must close it."""
        messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        return ends_in_reasoning(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def encode(self, example: Example, clips: Sequence[Clip]) -> Prompt:
        """Encode one prompt.

        Args:
            example: The row; its question and options are plain text (special tokens in them are removed).
            clips: Its decoded media, in the order of `example.seen`.

        Raises:
            UsageError: The chat template refuses the prompt, or leaves out or moves a part of it.
        """
        refs = example.seen
        cuts = [ref.cut for ref in refs] if len(refs) == len(clips) else [Cut()] * len(clips)
        media = tuple(self._preprocess(clip, len(clips), cut) for clip, cut in zip(clips, cuts))
        grids = (str(item.grid_thw) for item in media)
        text = (question_text(example), *example.options, example.system or "", *example.layout)
        key = (*text, *(clip.key for clip in clips), *grids)
        ids = self._ids.get(key)
        if ids is None:
            ids = self._encode(example, clips, media)
            self._ids.put(key, ids)
        return Prompt(input_ids=ids, media=media, example=example, clips=tuple(clips))

    def _messages(self, example: Example, clips: Sequence[Clip]) -> list[dict]:
        """The conversation as the chat template takes it."""
        content: list[dict[str, str]] = []
        pieces = (
            example.layout
            if len(example.layout) == len(clips) + 1
            else ("",) * len(clips) + (question_text(example),)
        )
        for piece, clip in zip(pieces, clips):
            if piece:
                content.append({"type": "text", "text": self._plain(piece)})
            content.append(self.family.content(clip))
        last = with_options(pieces[-1], example.options) if pieces is example.layout else pieces[-1]
        content.append({"type": "text", "text": self._plain(last)})
        messages: list[dict] = [{"role": "user", "content": content}]
        system = self._plain(example.system) if example.system else self.system_prompt
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return messages

    def _render(self, example: Example, clips: Sequence[Clip]) -> str:
        """The conversation as the chat template writes it."""
        messages, row = self._messages(example, clips), example.source or example.id
        try:
            text = self._apply_template(messages, clips)
        except Exception as error:  # templates raise whatever they like
            raise UsageError(
                f"{row}: the chat template of this model refuses the prompt: {first_line(error)}"
            ) from error
        written = _squeezed(text)
        for message in messages:
            if any(_squeezed(part.get("text", "")) not in written for part in message["content"]):
                raise UsageError(
                    f"{row}: the chat template of this model leaves out the text of the {message['role']} turn"
                )
        return text

    def _apply_template(self, messages: list[dict], clips: Sequence[Clip]) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self.family.chat_template(self.tokenizer, clips),
        )

    def _encode(self, example: Example, clips: Sequence[Clip], media: Sequence[Media]) -> Tensor:
        family = self.family
        if not family.pictures and any(clip.is_image for clip in clips):
            raise UsageError(
                f"{example.source or example.id}: {family.name} is trained on videos alone here, and the row shows a "
                "picture; leave such rows out"
            )
        text = self._render(example, clips)
        found_marks = self._marks.findall(text)
        parts = self._marks.split(text)
        for clip, block, found in zip_longest(clips, map(family.mark, clips), found_marks):
            if block != found:
                kind = "medium" if clip is None else "picture" if clip.is_image else "video"
                raise UsageError(
                    f"{example.source or example.id}: the chat template of this model leaves out or moves a {kind}; "
                    "use a model with a vision chat template"
                )
        pieces = [self._expand(clip, item) for clip, item in zip(clips, media)]
        text = "".join(piece for pair in zip_longest(parts, pieces, fillvalue="") for piece in pair)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, its end token last.

        After a prompt that ends inside the reasoning, an answer without reasoning first closes it. An answer with its
        own reasoning, whether or not it includes the opening mark, is neither opened nor closed twice.
        """
        text = self._plain(answer, answer=True)
        if self.reasons:
            _, opened, behind = text.partition(OPENS)
            if opened and CLOSES in behind:
                text = behind.lstrip()
            elif CLOSES not in text:
                text = f"{CLOSES}\n\n{text}"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.family.turn_end
        return [
            *ids,
            self.tokenizer.eos_token_id if end is None else self.tokenizer.convert_tokens_to_ids(end),
        ]

    @cached_property
    def closing(self) -> list[int]:
        """The tokens with which an answer without reasoning closes what the template opened; empty if nothing."""
        return self.encode_answer("")[:-1]

    def closed(self, prompt: Prompt) -> Prompt:
        """The prompt with any reasoning that its template left open closed, so that the answer follows at once."""
        length, more = len(prompt.input_ids), len(self.closing)
        if not more:
            return prompt
        inputs = prompt.inputs and {
            name: functional.pad(value, (0, more)) if value.shape == (1, length) else value
            for name, value in prompt.inputs.items()
        }
        ids = torch.cat((prompt.input_ids, torch.tensor(self.closing)))
        return replace(prompt, input_ids=ids, inputs=inputs)

    def _expand(self, clip: Clip, media: Media) -> str:
        if clip.is_image:
            return self.family.image_text(media, self.patch_spec)
        return self.family.video_text(clip, media, self.patch_spec)

    def _preprocess(self, clip: Clip, share: int, cut: Cut) -> Media:
        pixels = self.pixels.cut(cut)
        key = (clip.key, share, pixels)
        media = self._media.get(key)
        if media is None:
            total = pixels.total_pixels
            media = preprocess(
                clip,
                self.patch_spec,
                min_pixels=pixels.min_pixels,
                max_pixels=pixels.max_pixels,
                total_pixels=None if total is None else total // share,
                device=self.device,
                dtype=self.dtype,
                backend=self.patchify,
            )
            self._media.put(key, media)
        return media

    def _plain(self, text: str, *, answer: bool = False) -> str:
        """`text` without the tokenizer's marks: a question or an answer is data, never markup."""
        marks = self._markup_in_answers if answer else self._markup
        while marks.search(text):  # removing one mark can form another
            text = marks.sub(" ", text)
        return text
