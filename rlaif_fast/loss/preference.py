"""Losses of preferences: pairs of responses, one chosen over the other, on the same chunk driver.

Letters: P pairs, B = 2 P responses (each chosen one before its rejected one), T tokens, M packed tokens, H
hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlaif_fast.loss import backends, checks, ops, reference
from rlaif_fast.loss.inputs import Head, Padding, RowInputs, TokenGradients
from rlaif_fast.loss.options import LossOptions, check_number
from rlaif_fast.loss.reference.preference import PREFERENCE_STATS, dpo_loss

__all__ = ["PreferenceOutput", "fused_linear_dpo_loss"]


class PreferenceOutput(NamedTuple):
    """A loss of preferences and what it was made of.

    Attributes:
        loss: Scalar, differentiable.
        rewards: (B,) implicit reward of each response; detached.
        stats: Means over the pairs: `margin`, `accuracy`, `reward_chosen`, `reward_rejected`; detached.
    """

    loss: Tensor
    rewards: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class DpoClose:
    """The `linear.Close` of the sigmoid DPO loss: a pair needs both its responses."""

    mask: Tensor  # (B, T) bool
    ref_logps_sum: Tensor  # (B,)
    beta: float

    unit = 2
    dense = True
    options = LossOptions()

    def rows(self) -> RowInputs | None:
        """Return None: a row's gradient needs the whole pair."""
        return None

    def close(self, logps: Tensor, entropy: Tensor) -> TokenGradients:  # (B, T)
        """Return the loss of all pairs and its gradient."""
        loss, rewards, stats = dpo_loss(logps, self.mask, self.ref_logps_sum, self.beta)
        grad, _ = self.part(slice(0, len(logps)), logps, entropy)
        return TokenGradients(loss, rewards, stats, grad, None)

    def part(self, responses: slice, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of logps (b, T): a pair's responses move by beta sigmoid(-margin), apart."""
        mask = self.mask[responses]
        total = logps.where(mask, 0.0).sum(-1)
        rewards = self.beta * (total - self.ref_logps_sum[responses].to(total.dtype))
        pull = self.beta * torch.sigmoid(rewards[1::2] - rewards[0::2]) / max(1, len(self.mask) // 2)
        return mask * torch.stack([-pull, pull], 1).view(-1, 1), None


def fused_linear_dpo_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (M,)
    *,
    ref_logps_sum: Tensor,  # (B,)
    beta: float = 0.1,
    mask: Tensor | None = None,  # (B, T) or (M,)
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    lengths: Tensor | None = None,  # (B,)
    chunk_size: int | None = None,
    backend: str = "auto",
) -> PreferenceOutput:
    """Return the sigmoid DPO loss from the hidden states that predict the tokens; logits are never kept.

    Args:
        hidden: (B, T, H) float, aligned with `token_ids`, chosen and rejected responses alternating; or
            (M, H) packed, with `lengths`. Differentiable.
        weight: (V, H) float, the head; differentiable.
        token_ids: (B, T) or (M,) int64 or int32 in [0, V) wherever the mask is 1.
        ref_logps_sum: (B,) float, log-probability of each whole response under the reference policy, in nats.
        beta: Above 0; how strongly the policy is held to the reference.
        mask: (B, T) or (M,) bool or 0/1; a token that is 0 contributes nothing.
        bias: (V,) float; differentiable.
        temperature: Above 0; divides the logits.
        logit_softcap: Above 0; bounds the logits: cap * tanh(logits / cap), before the temperature.
        logit_scale: Above 0; multiplies the logits, before the cap.
        lengths: (B,) int64 tokens of each response, their sum M, when packed.
        chunk_size: Rows of logits in memory at once; chosen by V where None.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        `PreferenceOutput`: loss, rewards (B,) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.

    Source: arXiv 2305.18290.
    """
    checks.floating("hidden", hidden, ("B", "T", "H") if lengths is None else ("M", "H"))
    checks.head(hidden, weight, bias, chunk_size)
    shape = tuple(hidden.shape[:-1])
    responses = shape[0] if lengths is None else checks.lengths(lengths, shape[0], hidden)
    if responses % 2:
        raise ValueError(f"hidden must hold pairs, chosen before rejected; got {responses} responses")
    check_number("beta", beta, minimum=0.0, strict=True)
    checks.floating("ref_logps_sum", ref_logps_sum, (responses,), like=hidden)
    mask = checks.mask(mask, shape, hidden)
    checks.token_ids("token_ids", token_ids, shape, like=hidden)
    checks.ids_in_range("token_ids", token_ids, weight.shape[0], mask)
    if mask is not None:
        token_ids = token_ids.where(mask, 0)

    padding = None if lengths is None else Padding(lengths)
    if mask is None:
        grid = hidden.new_ones(shape, dtype=torch.bool) if padding is None else padding.mask
    else:
        grid = mask if padding is None else padding.pad(mask)
    close = DpoClose(grid, ref_logps_sum.detach(), beta)
    scaling = checks.scaling(temperature, logit_softcap, logit_scale, shape, hidden)
    head = Head(weight, bias, scaling)
    chosen = backends.select("linear_loss", backend, hidden)
    if chosen == "reference":
        logps, _, _ = reference.padded_logps(hidden, head, token_ids, lengths)
        loss, rewards, stats = dpo_loss(logps, grid, close.ref_logps_sum, beta)
    else:
        loss, rewards, stats = ops.with_close(
            hidden, head, token_ids, padding, lambda *_: close, chunk_size, chosen
        )
    return PreferenceOutput(loss, rewards, dict(zip(PREFERENCE_STATS, stats.unbind())))
