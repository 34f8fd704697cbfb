"""The per-token inputs of the loss, padded or packed.

Letters: N groups, G responses a group, B = N * G rows, T tokens, M packed tokens (the responses one after
    another).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenInputs(NamedTuple):
    """The checked tensors of a loss; where packed, every (B, T) is (M,). Exactly one of the first two is
    given."""

    advantages: Tensor | None  # (B,) or (B, T)
    oracle_ranks: Tensor | None  # (N, G)
    valid: Tensor | None  # (N,) bool
    old_logps: Tensor | None  # (B, T)
    ref_logps: Tensor | None  # (B, T)
    mask: Tensor | None  # (B, T) bool
    sampling_ratio: Tensor | None  # (B, T) or (B, 1)
    num_items: Tensor | None  # scalar

    @property
    def group_size(self) -> int | None:
        """G where the loss ranks, else None."""
        return None if self.oracle_ranks is None else self.oracle_ranks.shape[1]

    def responses(self, rows: slice) -> TokenInputs:
        """Return the inputs of some responses: whole groups where the loss ranks."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        ranks, valid, G = self.oracle_ranks, self.valid, self.group_size
        groups = rows if G is None else slice(rows.start // G, rows.stop // G)
        return TokenInputs(
            advantages=part(self.advantages),
            oracle_ranks=None if ranks is None else ranks[groups],
            valid=None if valid is None else valid[groups],
            old_logps=part(self.old_logps),
            ref_logps=part(self.ref_logps),
            mask=part(self.mask),
            sampling_ratio=part(self.sampling_ratio),
            num_items=self.num_items,
        )


class Padding:
    """Moves tokens between the packed layout (M,) and the padded one (B, T), T the longest response."""

    def __init__(self, lengths: Tensor) -> None:  # (B,)
        longest = int(lengths.max()) if lengths.numel() else 0
        self.mask = torch.arange(longest, device=lengths.device) < lengths[:, None]  # (B, T) bool

    def pad(self, packed: Tensor) -> Tensor:  # (M,) -> (B, T)
        """Lay the tokens out in rows; what is not a token is 0."""
        return packed.new_zeros(self.mask.shape).masked_scatter(self.mask, packed)

    def pack(self, padded: Tensor) -> Tensor:  # (B, T) -> (M,)
        """Take the tokens out of rows again."""
        return padded[self.mask]

    def pad_inputs(self, inputs: TokenInputs) -> TokenInputs:
        """Lay every per-token tensor out in rows; the mask is then never None."""

        def pad(x: Tensor | None) -> Tensor | None:
            return None if x is None else self.pad(x)

        rows = self.mask.shape[0]
        advantages, ratio = inputs.advantages, inputs.sampling_ratio
        return inputs._replace(
            mask=self.mask if inputs.mask is None else self.pad(inputs.mask),
            old_logps=pad(inputs.old_logps),
            ref_logps=pad(inputs.ref_logps),
            sampling_ratio=ratio if ratio is not None and ratio.dim() == 2 else pad(ratio),
            advantages=advantages if advantages is None or len(advantages) == rows else pad(advantages),
        )
