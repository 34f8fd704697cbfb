"""Attention that is more, or less, than causal: pictures whose tokens see each other, and layers with a window.

    a token q sees k  where  (k is on the path to q, or in the same picture)  and  place(q) - place(k) < window

Places count the tokens of a response after its prompt, as if it were alone. Such rows use one mask over the prompts and
responses of each bucket instead of a causal call for the prompts, so their attention takes memory quadratic in size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.attention import AttentionContext, DeviceBucket, SdpaContext, sdpa
from rlaif_fast.policy.packing import Bucket, PackedRow, bucket_mask, bucket_nodes


@dataclass(frozen=True)
class Pattern:
    """How a decoder's layers attend.

    Attributes:
        windows: Number of tokens that each layer sees, including the present one; None for all.
        pictures: Whether the tokens of a picture see each other in both directions.
    """

    windows: tuple[int | None, ...]
    pictures: bool


def window_of(pattern: Pattern | None, layer: int) -> int | None:
    """Number of tokens that a layer sees; None for all."""
    return None if pattern is None else pattern.windows[layer]


def picture_runs(is_media: np.ndarray) -> np.ndarray:
    """(P,) number of the run of media tokens that each token belongs to; -1 for text."""
    begins = is_media & ~np.concatenate(([False], is_media[:-1]))
    return np.where(is_media, np.cumsum(begins) - 1, -1)


def backend_name(name: str, pattern: Pattern | None) -> str:
    """The attention backend for `name`; with a pattern, the one that supports masks.

    Raises:
        UsageError: `name` is another backend than that.
    """
    if pattern is None or name == "sdpa":
        return name
    if name != "auto":
        raise UsageError(
            f"attention_backend: this model has layers with a window, or pictures whose tokens see each other; {name} "
            "does not know them, use auto or sdpa"
        )
    return "sdpa"


def row_context(
    row: PackedRow,
    device: torch.device,
    pattern: Pattern | None,
    layouts: Sequence[HasRuns],
    causal: Callable[[PackedRow, torch.device], AttentionContext],
) -> AttentionContext:
    """The attention of a packed row.

    Args:
        row: Its layout.
        device: Device of the tensors.
        pattern: How the model attends; None for causal attention.
        layouts: Layouts of the row's prompts.
        causal: Makes the context of a model without a pattern.
    """
    if pattern is None:
        return causal(row, device)
    return PatternContext(row, device, pattern, [layout.picture_runs for layout in layouts])


class HasRuns(Protocol):
    """The layout of a prompt."""

    @property
    def picture_runs(self) -> np.ndarray:
        """(P,); see `picture_runs`."""
        ...


class PatternContext:
    """The attention of a packed row under a pattern.

    Args:
        row: Its layout.
        device: Device of the tensors.
        pattern: The pattern.
        runs: `picture_runs` of each of the row's prompts; not read if pictures are causal.
    """

    def __init__(
        self, row: PackedRow, device: torch.device, pattern: Pattern, runs: Sequence[np.ndarray]
    ) -> None:
        runs = runs if pattern.pictures else []
        self._pattern = pattern
        self._by_window = {window: _Masked(row, device, window, runs) for window in set(pattern.windows)}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `AttentionContext`."""
        return self._by_window[window_of(self._pattern, layer)].attend(layer, query, key, value, scale)


class _Masked(SdpaContext):
    """One masked call per bucket."""

    def __init__(
        self, row: PackedRow, device: torch.device, window: int | None, runs: Sequence[np.ndarray]
    ) -> None:
        self._window, self._runs = window, runs
        super().__init__(row, device)

    def _parts(self, row: PackedRow, bucket: Bucket, device: torch.device) -> None:
        """None: a pattern always needs a mask."""

    def _mask(self, row: PackedRow, bucket: Bucket, device: torch.device) -> Tensor:
        """(n, 1, P + R, P + R) bool; a padding slot sees at least itself, and its output is dropped later."""
        place = torch.arange(bucket.prompt, device=device)
        of_prompt = (place[:, None] >= place).expand(len(bucket.groups), -1, -1)
        if self._runs:
            run = np.full((len(bucket.groups), bucket.prompt), -1)
            for padded, group in zip(run, bucket.groups):
                padded[: len(self._runs[group])] = self._runs[group]
            runs = torch.from_numpy(run).to(device)
            of_prompt = of_prompt | ((runs[:, :, None] == runs[:, None]) & (runs[:, None] >= 0))
        allowed = torch.nn.functional.pad(of_prompt, (0, bucket.response))
        if bucket.response:
            allowed = torch.cat((allowed, bucket_mask(row, bucket, device)), dim=1)
        if self._window is not None:
            places = torch.from_numpy(_places(row, bucket)).to(device)
            allowed = allowed & (places[:, :, None] - places[:, None] < self._window)
        return allowed[:, None]

    def _attend_bucket(
        self, bucket: DeviceBucket, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        q, k, v = bucket.grid(query), bucket.grid(key), bucket.grid(value)
        return bucket.ungrid(sdpa(q, k, v, scale=scale, mask=bucket.additive_mask(q.dtype)).transpose(1, 2))


def _places(row: PackedRow, bucket: Bucket) -> np.ndarray:
    """(n, P + R) place of each slot's token in its own sequence."""
    _, node = bucket_nodes(row, bucket)
    depth = row.node_depth[node] if len(row.node_depth) else node
    prompts = np.broadcast_to(np.arange(bucket.prompt), (len(bucket.groups), bucket.prompt))
    return np.concatenate((prompts, row.prompt_lengths[bucket.groups, None] + depth), axis=1)
