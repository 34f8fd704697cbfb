"""The order in which rows are visited, and how they become encoded prompts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from rlaif_fast.data.schema import Example
from rlaif_fast.policy.cut import cut
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.prompts.encoder import Prompt, PromptEncoder
from rlaif_fast.video import ClipStore, VideoError
from rlaif_fast.video.base import Clip
from rlaif_fast.video.clips import clip_key
from rlaif_fast.video.refs import MediaRef


def by_media(examples: Sequence[Example]) -> list[list[Example]]:
    """Rows grouped by media, in order of first appearance; each row without media is a group of its own."""
    groups: dict[tuple, list[Example]] = {}
    for example in examples:
        key: tuple = example.seen or (example.id,)
        groups.setdefault(key, []).append(example)
    return list(groups.values())


class EpochOrder:
    """A seeded order over items, a fresh permutation each epoch; any step can be computed, so resuming needs no state.

    Args:
        items: The items to visit.
        per_step: Items per step; an epoch's last step is filled from the next epoch, nothing is dropped.
        seed: Seed of the permutations.
    """

    def __init__(self, items: Sequence, per_step: int, seed: int) -> None:
        self.items = items
        self.per_step = per_step
        self.seed = seed
        self._epochs: dict[int, list[int]] = {}

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            # one step spans at most two epochs
            self._epochs = {e: order for e, order in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = torch.randperm(len(self.items), generator=generator).tolist()
        return self._epochs[epoch]

    def step(self, index: int) -> list:
        """The items of step `index` (0-based)."""
        return [item for _, item in self.visits(index)]

    def visits(self, index: int) -> list[tuple[int, Any]]:
        """The items of step `index`, each with the number of its earlier visits."""
        chosen = []
        for position in range(index * self.per_step, (index + 1) * self.per_step):
            epoch, offset = divmod(position, len(self.items))
            chosen.append((epoch, self.items[self._permutation(epoch)[offset]]))
        return chosen


def take_turns(rows: Sequence[Example], most: int, visit: int) -> list[Example]:
    """At most `most` of the rows; each visit takes the next ones, wrapping around."""
    if len(rows) <= most:
        return list(rows)
    return [rows[(visit * most + k) % len(rows)] for k in range(most)]


def cut_by_tokens(
    prompts: Sequence[EncodedPrompt], response_tokens: Sequence[int], max_tokens: int
) -> list[slice]:
    """Cut consecutive prompts into parts of at most `max_tokens`; a longer prompt is a part of its own.

    Args:
        prompts: N prompts; the prefix that one shares with the previous prompt about the same media is not counted.
        response_tokens: (N,) tokens of the responses to each.
        max_tokens: Most tokens of prompts and responses together.
    """
    sizes = [len(prompt.input_ids) + responses for prompt, responses in zip(prompts, response_tokens)]
    shared = [0, *(_shared(*pair) for pair in pairwise(prompts))]
    return cut(sizes, max_tokens, [size - common for size, common in zip(sizes, shared)])


def _shared(first: EncodedPrompt, second: EncodedPrompt) -> int:
    """Length in tokens of the prefix that two prompts about the same media share."""
    if not first.media or [m.key for m in first.media] != [m.key for m in second.media]:
        return 0
    length = min(len(first.input_ids), len(second.input_ids))
    return int((first.input_ids[:length] == second.input_ids[:length]).cumprod(0).sum())


class BatchMaker:
    """Turns rows into prompts.

    A row whose media cannot be read is left out; the store quarantines the file and counts it.

    Args:
        encoder: Encodes prompts for the model.
        store: Loads clips.
        blank_frames: Replace every frame by grey, the control for what can be answered without seeing.
    """

    def __init__(self, encoder: PromptEncoder, store: ClipStore, *, blank_frames: bool = False) -> None:
        self.encoder = encoder
        self.store = store
        self.blank_frames = blank_frames
        self._ahead: dict[MediaRef, Future[Clip]] = {}

    def __enter__(self) -> BatchMaker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.store.close()

    def prefetch(self, examples: Sequence[Example]) -> None:
        """Start decoding the media of rows that will be needed next."""
        self._ahead = self._submit(examples)

    def __call__(self, examples: Sequence[Example]) -> list[Prompt]:
        """Load and encode `examples`; the rows with bad media are missing from the result."""
        prompts = []
        loads, self._ahead = self._submit(examples), {}
        for example in examples:
            try:
                media = tuple(loads[file].result() for file in example.seen)
                if self.blank_frames:
                    media = tuple(blanked(clip) for clip in media)
                prompts.append(self.encoder.encode(example, media))
            except VideoError:
                self.store.stats.dropped += 1
        return prompts

    def _submit(self, examples: Sequence[Example]) -> dict[MediaRef, Future[Clip]]:
        """One load per file, however many rows ask about it; loads already started are reused."""
        wanted = dict.fromkeys(file for example in examples for file in example.seen)
        return {file: self._ahead.get(file) or self.store.submit(file) for file in wanted}


def filling_prompt(encoder: PromptEncoder, *, with_media: bool) -> Prompt:
    """A short prompt for a pass that learns nothing, about a small black clip if `with_media` is set."""
    clips = []
    if with_media:
        spec = encoder.patch_spec
        pixels = torch.zeros(spec.temporal_patch_size, spec.factor, spec.factor, 3, dtype=torch.uint8)
        times = tuple(map(float, range(len(pixels))))
        clips = [Clip(pixels, times, key="filling prompt", sample_fps=1.0)]
    return encoder.encode(Example(id="filling prompt", question="?"), clips)


def blanked(clip: Clip) -> Clip:
    """The clip with every frame mid-grey at the same times: all that a policy without sight would get."""
    kind = "image" if clip.is_image else f"video:{clip.sample_fps}"
    key = clip_key(f"blank:{kind}", clip.timestamps, tuple(clip.frames.shape))
    return replace(clip, frames=torch.full_like(clip.frames, 128), key=key)
