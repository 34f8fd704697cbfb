"""Vision features: the tower runs once for each distinct video or image, and its output is shared.

The output of a frozen tower is also cached from call to call, within a budget of bytes. A fingerprint of its
parameters (each tensor's identity and in-place version) guards the cache: loading a checkpoint empties it. The
output of a tower that trains is never cached: fused optimizers change weights without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.policy.cut import cut
from rlaif_fast.policy.families.base import Family
from rlaif_fast.policy.packing import ranges
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.recent import RecentlyUsed
from rlaif_fast.video.media import Media

MAX_PATCHES_A_CALL = 65_536  # of a tower call without gradient; bounds its memory


@dataclass(frozen=True)
class MediaFeatures:
    """The vision tower's output for the media of some prompts.

    Attributes:
        levels: The projector's output first, then each deepstack level, each (F, H), media after media.
        spans: Where the rows of a medium are: key -> (begin, rows).
    """

    levels: tuple[Tensor, ...]
    spans: dict[str, tuple[int, int]]

    def gather(self, prompts: Iterable[EncodedPrompt]) -> tuple[Tensor, ...]:
        """The rows of the media of `prompts`, prompt after prompt, in order of appearance; one tensor a
        level.
        """
        spans = [self.spans[media.key] for prompt in prompts for media in prompt.media]
        begins, lengths = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
        index = torch.from_numpy(np.repeat(begins, lengths) + ranges(lengths)).to(self.levels[0].device)
        return tuple(level.index_select(0, index) for level in self.levels)

    def detach(self) -> MediaFeatures:
        """The same features without their graph, for a rollout or a reference pass."""
        return MediaFeatures(tuple(level.detach() for level in self.levels), self.spans)

    @property
    def requires_grad(self) -> bool:
        """Whether they carry the tower's graph."""
        return self.levels[0].requires_grad

    @classmethod
    def concat(cls, parts: Sequence[MediaFeatures]) -> MediaFeatures:
        """Several as one; a medium that occurs in more than one is taken from the last."""
        begins = np.cumsum([0, *(len(part.levels[0]) for part in parts[:-1])]).tolist()
        spans = {
            key: (begin + at, rows)
            for begin, part in zip(begins, parts)
            for key, (at, rows) in part.spans.items()
        }
        return cls(tuple(torch.cat(level) for level in zip(*(part.levels for part in parts))), spans)

    def leaves(self) -> MediaFeatures:
        """The same features as leaves that collect gradient, so that several backward passes can share one
        tower pass.

        After the last backward pass, call `backward_from` of the original with the leaves.
        """
        return MediaFeatures(tuple(level.detach().requires_grad_() for level in self.levels), self.spans)

    def backward_from(self, leaves: MediaFeatures) -> None:
        """Send the gradient that `leaves` collected through the tower, once."""
        pairs = [
            (level, leaf.grad) for level, leaf in zip(self.levels, leaves.levels) if leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([level for level, _ in pairs], [grad for _, grad in pairs])


class VisionEncoder:
    """Runs a vision tower once for each distinct medium.

    Args:
        tower: The modules that make features (`Family.vision`).
        cache_bytes: Budget for cached features while no parameter of the tower trains; 0 caches none.
        family: How it computes them from patches; None for a tower that takes patches and grids.
    """

    def __init__(self, tower: nn.Module, cache_bytes: int, family: Family | None = None) -> None:
        self.tower = tower
        self.family = family or Family()
        self.calls = 0  # media encoded so far
        self._cache: RecentlyUsed[str, tuple[Tensor, ...]] = RecentlyUsed(cache_bytes, _bytes)
        self._fingerprint: tuple = ()

    @property
    def trains(self) -> bool:
        """Whether any parameter of the tower is trained."""
        return any(p.requires_grad for p in self.tower.parameters())

    def __call__(self, prompts: Sequence[EncodedPrompt]) -> MediaFeatures | None:
        """Features of every distinct medium of `prompts`; None if there are none."""
        media = {m.key: m for prompt in prompts for m in prompt.media}
        if not media:
            return None
        trains = self.trains
        if trains:
            self._cache.clear()
        if trains and torch.is_grad_enabled():
            pieces = self._encode(list(media.values()))
        else:
            self._forget_if_changed()
            known = {key: piece for key in media if (piece := self._cache.get(key)) is not None}
            missing = [m for m in media.values() if m.key not in known]
            fresh: dict[str, tuple[Tensor, ...]] = {}
            with torch.no_grad():
                for part in cut([math.prod(m.grid_thw) for m in missing], MAX_PATCHES_A_CALL):
                    chunk = missing[part]
                    fresh |= zip((m.key for m in chunk), self._encode(chunk))
            known |= fresh
            pieces = [known[key] for key in media]
            if not trains:
                self._remember(fresh)
        lengths = [len(piece[0]) for piece in pieces]
        begins = np.cumsum([0, *lengths[:-1]]).tolist()
        levels = tuple(torch.cat(level) for level in zip(*pieces))
        return MediaFeatures(levels, dict(zip(media, zip(begins, lengths))))

    def _encode(self, media: Sequence[Media]) -> list[tuple[Tensor, ...]]:
        self.calls += len(media)
        return self.family.features(self.tower, media)

    def _forget_if_changed(self) -> None:
        parameters = list(self.tower.parameters())
        # Features computed under autocast are cached apart from others.
        computed = {dtype_of(p.device, p.dtype) for p in parameters}
        fingerprint = (computed, *((p.data_ptr(), p._version) for p in parameters))
        if fingerprint != self._fingerprint:
            self._cache.clear()
            self._fingerprint = fingerprint

    def _remember(self, fresh: dict[str, tuple[Tensor, ...]]) -> None:
        for key, piece in fresh.items():
            if _bytes(piece) <= self._cache.budget:
                # a view would keep the whole call alive
                self._cache.put(key, tuple(level.clone() for level in piece))


def _bytes(piece: Iterable[Tensor]) -> int:
    return sum(level.numel() * level.element_size() for level in piece)
