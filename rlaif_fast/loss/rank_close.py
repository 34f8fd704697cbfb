"""How the GRPO_rank loss is closed over log-probabilities that the chunk driver has made.

Letters: N groups, G responses a group, B = N * G, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import RowInputs, TokenGradients, TokenInputs
from rlaif_fast.loss.options import LossOptions
from rlaif_fast.loss.reference.rank_loss import entropy_weights, items_of, token_weights


@dataclass(frozen=True, eq=False)
class RankClose:
    """The `linear.Close` of the GRPO_rank loss; `kernels` closes a batch (`rank_loss`)."""

    kernels: Any
    like: Tensor  # of the dtype of the statistics
    shape: tuple[int, int]  # (B, T)
    inputs: TokenInputs  # padded
    options: LossOptions

    @cached_property
    def valid(self) -> Tensor:  # (B,) bool
        """The responses of valid groups."""
        rows = self.inputs.valid_rows
        return self.like.new_ones(self.shape[0], dtype=torch.bool) if rows is None else rows

    @cached_property
    def mask(self) -> Tensor:  # (B, T) bool
        """The tokens that count."""
        mask = self.inputs.mask
        if mask is None:
            return self.valid[:, None].expand(self.shape)
        return mask if self.inputs.valid is None else mask & self.valid[:, None]

    @property
    def unit(self) -> int:
        """Groups where the loss ranks, else single responses."""
        return self.inputs.group_size or 1

    @property
    def dense(self) -> bool:
        """KL and entropy give every token a gradient."""
        return self.options.beta != 0.0 or self.options.entropy_coef != 0.0

    @property
    def advantages_known(self) -> bool:
        """Whether the advantages are independent of the rows that are being evaluated."""
        inputs = self.inputs
        given = (inputs.advantages, inputs.scores, inputs.old_logps)
        return any(x is not None for x in given) or not self.options.orders_policy

    def rows(self) -> RowInputs | None:
        """Return what each token needs, where neither its advantage nor its ratio depends on other rows."""
        if not self.advantages_known or self.options.per_sequence:
            return None
        inputs, wide = self.inputs, self.like.dtype
        advantages = inputs.advantages
        # the order is that of the scores, of the old log-probabilities, or none is needed
        if advantages is None:
            old = self.like.new_zeros(self.shape) if inputs.old_logps is None else inputs.old_logps.to(wide)
            advantages = self.close(old, torch.zeros_like(old)).advantages
        advantages = advantages.to(wide)
        length = self.mask.sum(-1)
        weights = token_weights(self.mask, length, self.valid, inputs.num_items, self.options, wide)
        tokens = self.options.entropy_aggregate == "tokens"

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(wide)

        return RowInputs(
            advantages[:, None] if advantages.dim() == 1 else advantages,
            weights,
            cast(inputs.old_logps),
            cast(inputs.ref_logps) if self.options.beta != 0.0 else None,
            cast(inputs.sampling_ratio),
            entropy_weights(self.mask, weights, inputs.num_tokens, self.options) if tokens else None,
        )

    def close(self, logps: Tensor, entropy: Tensor) -> TokenGradients:  # (B, T)
        """Return the loss of all responses and its gradients."""
        return self.kernels.rank_loss(logps, entropy, self.inputs, self.options)

    def part(self, responses: slice, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of logps and entropy (b, T) of some responses, as parts of the whole batch."""
        inputs = replace(self.inputs.responses(responses), num_items=self._items, num_tokens=self._tokens)
        closed = self.kernels.rank_loss(logps, entropy, inputs, self.options)
        return closed.grad_logps, None if self.options.entropy_coef == 0.0 else closed.grad_entropy

    @cached_property
    def _items(self) -> Tensor:  # scalar
        """What the aggregate of the whole batch divides by."""
        if self.inputs.num_items is not None:
            return self.inputs.num_items
        return items_of(self.mask, self.valid, self.options).clamp(min=1).to(self.like.dtype)

    @cached_property
    def _tokens(self) -> Tensor:  # scalar
        """How many tokens of the whole batch count."""
        if self.inputs.num_tokens is not None:
            return self.inputs.num_tokens
        return self.mask.sum().clamp(min=1).to(self.like.dtype)
