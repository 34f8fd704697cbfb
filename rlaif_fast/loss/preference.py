"""Losses of preferences: responses compared with others of the same prompt, on the same chunk driver.

Letters: P pairs, N groups, G responses a group, B responses (2 P, each chosen one before its rejected one; or N * G),
T tokens, M packed tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from rlaif_fast.loss import backends, checks, ops, values
from rlaif_fast.loss.inputs import Head, Padding, RowInputs, TokenGradients
from rlaif_fast.loss.linear import Close
from rlaif_fast.loss.options import LossOptions, check_number
from rlaif_fast.loss.reference.preference import (
    PREFERENCE_STATS,
    dpo_loss,
    implicit_rewards,
    lambda_weights,
    lipo_loss,
)

__all__ = ["PreferenceArguments", "PreferenceOutput", "fused_linear_dpo_loss", "fused_linear_lipo_loss"]


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


class PreferenceArguments(TypedDict, total=False):
    """What every loss of preferences takes beside its own arguments; see `fused_linear_dpo_loss`."""

    beta: float
    mask: Tensor | None
    bias: Tensor | None
    temperature: float
    logit_softcap: float | None
    logit_scale: float
    lengths: Tensor | None
    num_items_in_batch: float | Tensor | None
    chunk_size: int | None
    float32_weight: Tensor | None
    validate: bool
    backend: str


@dataclass(frozen=True, eq=False)
class PreferenceClose(ABC):
    """The common part of the `linear.Close` of every loss of preferences: a unit needs all its responses."""

    mask: Tensor  # (B, T) bool
    ref_logps_sum: Tensor  # (B,)
    beta: float
    items: float | Tensor  # what the sum over pairs or groups is divided by

    dense = True
    options = LossOptions()

    def rows(self) -> RowInputs | None:
        """Return None: a row's gradient needs the whole unit."""
        return None

    def close(self, logps: Tensor, entropy: Tensor) -> TokenGradients:  # (B, T)
        """Return the loss of all units and its gradient."""
        loss, rewards, stats = self.reference(logps)
        grad, _ = self.part(slice(0, len(logps)), logps, entropy)
        return TokenGradients(loss, rewards, stats, grad, None)

    @abstractmethod
    def reference(self, logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, rewards and statistics in plain PyTorch."""

    @abstractmethod
    def part(self, responses: slice, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of logps (b, T) and entropy of some whole units."""

    def rewards(self, responses: slice, logps: Tensor) -> Tensor:  # (b, T) -> (b,)
        """Return the implicit rewards of some responses."""
        return implicit_rewards(logps, self.mask[responses], self.ref_logps_sum[responses], self.beta)

    def spread(self, responses: slice, pull: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of logps (b, T) from those of the implicit rewards (b,)."""
        return self.mask[responses] * (self.beta / self.items * pull)[:, None], None


@dataclass(frozen=True, eq=False)
class DpoClose(PreferenceClose):
    """The `linear.Close` of the sigmoid DPO loss."""

    pair_weights: Tensor | None  # (P,)

    unit = 2

    def reference(self, logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, rewards and statistics in plain PyTorch."""
        return dpo_loss(logps, self.mask, self.ref_logps_sum, self.beta, self.pair_weights, self.items)

    def part(self, responses: slice, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of logps (b, T): a pair's responses move by beta sigmoid(-margin), apart."""
        rewards = self.rewards(responses, logps)
        pull = torch.sigmoid(rewards[1::2] - rewards[0::2])
        if self.pair_weights is not None:
            pull = pull * self.pair_weights[responses.start // 2 : responses.stop // 2]
        return self.spread(responses, torch.stack([-pull, pull], 1).view(-1))


@dataclass(frozen=True, eq=False)
class LipoClose(PreferenceClose):
    """The `linear.Close` of the LiPO-lambda loss: a group is closed together."""

    labels: Tensor  # (N, G)
    judged: Tensor | None  # (N, G) bool
    group_weights: Tensor | None  # (N,)

    @property
    def unit(self) -> int:
        """G."""
        return self.labels.shape[1]

    def reference(self, logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, rewards and statistics in plain PyTorch."""
        groups = (self.labels, self.judged, self.group_weights)
        return lipo_loss(logps, self.mask, self.ref_logps_sum, self.beta, *groups, self.items)

    def part(self, responses: slice, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of logps (b, T): each pair moves by its weight times sigmoid(-margin), apart."""
        here = slice(responses.start // self.unit, responses.stop // self.unit)
        rewards = self.rewards(responses, logps).view(-1, self.unit)
        judged, weights = (None if x is None else x[here] for x in (self.judged, self.group_weights))
        if judged is not None:
            rewards = rewards.where(judged, 0.0)
        pairs = lambda_weights(self.labels[here], rewards, judged, weights)
        pull = pairs * torch.sigmoid(rewards[:, None, :] - rewards[:, :, None])  # [i, j]: i before j
        return self.spread(responses, (pull.sum(1) - pull.sum(2)).view(-1))


def fused_linear_dpo_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (M,)
    *,
    ref_logps_sum: Tensor,  # (B,)
    pair_weights: Tensor | None = None,  # (P,)
    **arguments: Unpack[PreferenceArguments],
) -> PreferenceOutput:
    """Return the sigmoid DPO loss from the hidden states that predict the tokens; logits are never kept.

    Args:
        hidden: (B, T, H) float, aligned with `token_ids`, chosen and rejected responses alternating; or
            (M, H) packed, with `lengths`. Differentiable.
        weight: (V, H) float, the head; differentiable.
        token_ids: (B, T) or (M,) int64 or int32 in [0, V) wherever the mask is 1.
        ref_logps_sum: (B,) float, log-probability of each whole response under the reference policy, in nats.
        pair_weights: (P,) float; multiplies the loss of each pair. None is 1.
        beta: Above 0, by default 0.1; how strongly the policy is held to the reference.
        mask: (B, T) or (M,) bool or 0/1; a token that is 0 contributes nothing.
        bias: (V,) float; differentiable.
        temperature: Above 0; divides the logits.
        logit_softcap: Above 0; bounds the logits: cap * tanh(logits / cap), before the temperature.
        logit_scale: Above 0; multiplies the logits, before the cap.
        lengths: (B,) int64 tokens of each response, their sum M, when packed.
        num_items_in_batch: Above 0; what the sum over the pairs is divided by, where this is a part of a larger
            batch. None is P.
        chunk_size: Rows of logits in memory at once; chosen by V where None.
        float32_weight: (V, H) float32 leaf of which a bfloat16 `weight` is the rounding: the weight's gradient is its
            gradient, and `weight` gets none.
        validate: Whether values are checked, which synchronises with an accelerator; False trusts the caller.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Returns:
        `PreferenceOutput`: loss, rewards (B,) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.

    Source: arXiv 2305.18290.
    """
    call = _Call(hidden, weight, token_ids, ref_logps_sum, arguments)
    if call.responses % 2:
        raise ValueError(f"hidden must hold pairs, chosen before rejected; got {call.responses} responses")
    pair_weights = call.weights("pair_weights", pair_weights, call.responses // 2)
    items = call.items(call.responses // 2)
    return call.run(DpoClose(call.grid, call.ref_logps_sum, call.beta, items, pair_weights))


def fused_linear_lipo_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (M,)
    *,
    ref_logps_sum: Tensor,  # (B,)
    labels: Tensor,  # (N, G)
    judged: Tensor | None = None,  # (N, G)
    group_weights: Tensor | None = None,  # (N,)
    **arguments: Unpack[PreferenceArguments],
) -> PreferenceOutput:
    """Return the LiPO-lambda loss from the hidden states that predict the tokens; logits are never kept.

    s_i = beta (log p(y_i) - log p_ref(y_i)). Every pair of a group in which one response has the higher label costs
    log(1 + exp(-(s_i - s_j))), weighed by |2^label_i - 2^label_j| |1 / log(1 + place_i) - 1 / log(1 + place_j)|, where
    the place of a response is its place by s, from 1. The weights carry no gradient. A group's pairs are added up.

    Args:
        hidden: As in `fused_linear_dpo_loss`, like every argument not listed here; the responses of a group adjacent.
        weight: (V, H) float, the head; differentiable.
        token_ids: (B, T) or (M,) int64 or int32.
        ref_logps_sum: (B,) float, in nats.
        labels: (N, G) float, higher is better, such as the share of its group that a response beats.
        judged: (N, G) bool; a response that is 0 is in no pair and has no place. None is all.
        group_weights: (N,) float; multiplies the loss of each group. None is 1.
        num_items_in_batch: What the sum over the groups is divided by; None is N.

    Returns:
        `PreferenceOutput`: loss, rewards (B,) and stats, whose means are over pairs.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.

    Source: arXiv 2402.01878.
    """
    call = _Call(hidden, weight, token_ids, ref_logps_sum, arguments)
    checks.floating("labels", labels, ("N", "G"), like=hidden)
    groups, size = labels.shape
    if groups * size != call.responses:
        raise ValueError(
            f"labels must be (N, G) with N * G = {call.responses} responses, got {tuple(labels.shape)}"
        )
    if size < 1:
        raise ValueError(f"labels must be (N, G) with G of at least 1, got {tuple(labels.shape)}")
    if judged is not None:
        checks.boolean("judged", judged, (groups, size), like=hidden)
    if values.can_read(labels, call.validate):
        counts = labels if judged is None else labels.where(judged, 0.0)
        if not torch.exp2(counts.float()).isfinite().all():
            raise ValueError("labels must be finite, and 2 ** label too; got another in a judged response")
    group_weights = call.weights("group_weights", group_weights, groups)
    close = LipoClose(
        call.grid, call.ref_logps_sum, call.beta, call.items(groups), labels.detach(), judged, group_weights
    )
    return call.run(close)


def _grid(mask: Tensor | None, padding: Padding | None, hidden: Tensor) -> Tensor:
    """(B, T) bool, the tokens that count."""
    if padding is not None:
        return padding.mask if mask is None else padding.pad(mask)
    return hidden.new_ones(hidden.shape[:-1], dtype=torch.bool) if mask is None else mask


class _Call:
    """The checked arguments that every loss of preferences takes."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        ref_logps_sum: Tensor,
        arguments: PreferenceArguments,
    ) -> None:
        unknown = sorted(arguments.keys() - PreferenceArguments.__annotations__.keys())
        if unknown:
            raise TypeError(f"unexpected arguments: {', '.join(unknown)}")
        bias, lengths = arguments.get("bias"), arguments.get("lengths")
        float32_weight = arguments.get("float32_weight")
        self.chunk_size, self.backend = arguments.get("chunk_size"), arguments.get("backend", "auto")
        self.validate, self.beta = arguments.get("validate", True), arguments.get("beta", 0.1)
        self.num_items = arguments.get("num_items_in_batch")
        checks.floating("hidden", hidden, ("B", "T", "H") if lengths is None else ("M", "H"))
        checks.head(hidden, weight, bias, self.chunk_size, float32_weight)
        shape = tuple(hidden.shape[:-1])
        self.responses = shape[0] if lengths is None else checks.lengths(lengths, shape[0], hidden, arguments)
        check_number("beta", self.beta, minimum=0.0, strict=True)
        mask = checks.mask(arguments.get("mask"), shape, hidden, self.validate)
        checks.integers("token_ids", token_ids, shape, like=hidden)
        values.ids_in_range(token_ids, weight.shape[0], mask, self.validate)
        checks.floating("ref_logps_sum", ref_logps_sum, (self.responses,), like=hidden)
        self.hidden, self.ref_logps_sum, self.mask = hidden, ref_logps_sum.detach(), mask
        self.token_ids = token_ids if mask is None else token_ids.where(mask, 0)
        self.padding = None if lengths is None else Padding(lengths, shape[0])
        self.grid = _grid(mask, self.padding, hidden)  # (B, T)
        scaling = checks.scaling(
            arguments.get("temperature", 1.0),
            arguments.get("logit_softcap"),
            arguments.get("logit_scale", 1.0),
            shape,
            hidden,
            self.validate,
        )
        self.head = Head(weight, bias, scaling, float32_weight)

    def weights(self, name: str, value: Tensor | None, units: int) -> Tensor | None:
        """Return what multiplies the loss of each pair or group, detached, or raise."""
        if value is None:
            return None
        checks.unit_weights(name, value, units, self.hidden, self.validate)
        return value.detach()

    def items(self, default: int) -> float | Tensor:
        """Return what a sum over pairs or groups is divided by."""
        wide = self.hidden.new_empty((), dtype=torch.promote_types(self.hidden.dtype, torch.float32))
        given = checks.num_items(self.num_items, wide, self.validate)
        return max(1, default) if given is None else given

    def run(self, close: Any) -> PreferenceOutput:
        """Return the loss of a close."""
        chosen = backends.select("linear_loss", self.backend, self.hidden)
        if ops.in_backward(self.hidden, self.head, chosen):
            rest = (self.padding, self.mask, self.chunk_size, chosen)
            logps, _ = ops.padded_logps(self.hidden, self.head, self.token_ids, *rest)
            loss, rewards, stats = close.reference(logps)
        else:
            made: Close = close
            loss, rewards, stats = ops.with_close(
                self.hidden, self.head, self.token_ids, self.padding, lambda *_: made, self.chunk_size, chosen
            )
        return PreferenceOutput(loss, rewards, dict(zip(PREFERENCE_STATS, stats.unbind())))
