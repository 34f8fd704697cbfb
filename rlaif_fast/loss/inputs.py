"""The tensors that pass between the public functions and the backends: one holder each, handed on whole.

Letters: N groups, G responses a group, B = N * G rows, T tokens, M packed tokens (the responses one after
another), V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict


@dataclass(frozen=True)
class RankInputs:
    """The checked tensors of the rank penalty."""

    scores: Tensor  # (N, G), higher is more likely
    oracle_ranks: Tensor  # (N, G), lower is better; scalar rewards, higher is better, for kind="zscore"
    judged: Tensor | None = None  # (N, G) bool; the others are no members of their group
    weights: Tensor | None = None  # (N,) multiply the advantages of a group


class RankAdvantages(NamedTuple):
    """What the ranks of N groups of G responses say; no field carries a gradient.

    A group with fewer than two judged responses says nothing: every field is 0 there.

    Attributes:
        advantages: (N, G); 0 for a response that was not judged.
        penalties: (N, G) rank penalty; bounded to [0, 1) unless kind is one of the paper's.
        ndcg: (N,) nDCG of the policy's order against the oracle's, in (0, 1].
        kendall_tau: (N,) Kendall tau-b of the two orders, in [-1, 1]; 0 where one of them is all ties.
        has_signal: (N,) bool; false where fewer than two responses were judged, or the oracle ties them all.
        top1_agreement: (N,) share of the oracle's best responses that the policy puts first too.
    """

    advantages: Tensor
    penalties: Tensor
    ndcg: Tensor
    kendall_tau: Tensor
    has_signal: Tensor
    top1_agreement: Tensor


def members_of(judged: Tensor | None, valid: Tensor | None) -> Tensor | None:  # (N, G), (N,) bool
    """Return which responses are members of their group, the judged ones of valid groups: (N, G) or (N, 1).

    None is all of them.
    """
    if valid is None:
        return judged
    return valid[:, None] if judged is None else judged & valid[:, None]


_OF_GROUPS = ("oracle_ranks", "scores", "judged", "weights", "valid")


@dataclass(frozen=True)
class TokenInputs:
    """The checked tensors of a loss; where packed, every (B, T) is (M,). Exactly one of the first two is
    given."""

    advantages: Tensor | None = None  # (B,) or (B, T)
    oracle_ranks: Tensor | None = None  # (N, G)
    scores: Tensor | None = None  # (N, G) that order the policy's responses; else old_logps, else the current
    judged: Tensor | None = None  # (N, G) bool
    weights: Tensor | None = None  # (N,)
    valid: Tensor | None = None  # (N,) bool
    old_logps: Tensor | None = None  # (B, T)
    ref_logps: Tensor | None = None  # (B, T)
    mask: Tensor | None = None  # (B, T) bool
    sampling_ratio: Tensor | None = None  # (B, T) or (B, 1)
    num_items: Tensor | None = None  # scalar, for the number of tokens or responses
    num_tokens: Tensor | None = None  # scalar, for the number of tokens where the entropy is a mean over them

    @property
    def group_size(self) -> int | None:
        """G where the loss ranks, else None."""
        return None if self.oracle_ranks is None else self.oracle_ranks.shape[1]

    @property
    def valid_rows(self) -> Tensor | None:  # (B,) bool
        """The responses of valid groups; None is all of them."""
        if self.valid is None:
            return None
        assert self.group_size is not None
        return self.valid.repeat_interleave(self.group_size)

    def counting(self, lengths: Tensor | None) -> Tensor | None:
        """Return which tokens count, (B, T) or (B, 1), or (M,) with lengths (B,): those of the mask in valid groups.

        None is all of them.
        """
        rows = self.valid_rows
        if rows is None:
            return self.mask
        tokens = rows[:, None] if lengths is None else rows.repeat_interleave(lengths)
        return tokens if self.mask is None else self.mask & tokens

    def responses(self, rows: slice) -> TokenInputs:
        """Return the inputs of some responses: whole groups where the loss ranks."""
        G = self.group_size or 1
        groups = slice(rows.start // G, rows.stop // G)
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, x in parts.items():
            if x is not None and name not in ("num_items", "num_tokens"):
                parts[name] = x[groups if name in _OF_GROUPS else rows]
        return TokenInputs(**parts)


class TokenGradients(NamedTuple):
    """A token-level loss with its gradient.

    Attributes:
        loss: Scalar.
        advantages: (B,), or (B, T) where they were given so.
        stats: (len(STATS),), in the order of `rlaif_fast.loss.options.STATS`.
        grad_logps: (B, T) of the loss; exactly 0 on masked tokens.
        grad_entropy: (B, T) of the loss, or None without `entropy`.
    """

    loss: Tensor
    advantages: Tensor
    stats: Tensor
    grad_logps: Tensor
    grad_entropy: Tensor | None


class RowStats(NamedTuple):
    """Statistics of M rows of logits, of z = the scaled logits; each (M,)."""

    logps: Tensor  # z_y - lse
    lse: Tensor  # logsumexp z
    entropy: Tensor  # lse - sum softmax(z) z


class RowInputs(NamedTuple):
    """What the loss needs to know of M rows when their advantages are known beforehand; each (M,), float32 or
    wider."""

    advantages: Tensor
    weights: Tensor  # what the row counts in the aggregate; 0 masks it
    old_logps: Tensor | None  # None is on-policy
    ref_logps: Tensor | None
    sampling_ratio: Tensor | None
    entropy_weights: Tensor | None = None  # what the row's entropy counts; None is `weights`

    def rows(self, span: slice) -> RowInputs:
        """Return some of the rows."""
        return RowInputs(*(None if x is None else x[span] for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scaling:
    """What happens to logits before the softmax: z = cap tanh(scale logits / cap) / temperature, or
    scale logits / temperature where there is no cap."""

    temperature: float = 1.0
    temperatures: Tensor | None = None  # (M,) in its place, one a row
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, at: Tensor | slice | None) -> Scaling:
        """Return the scaling of some rows; None is all."""
        if self.temperatures is None or at is None:
            return self
        return replace(self, temperatures=self.temperatures[at])

    @property
    def factor(self) -> float:
        """What multiplies a logit, or its cap, besides the temperature."""
        return self.logit_scale if self.softcap is None else 1.0


class Head(NamedTuple):
    """The last layer: logits = hidden @ weight.T + bias, then scaled."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scaling: Scaling = Scaling()
    float32_weight: Tensor | None = None  # (V, H) of which `weight` is the rounding

    @property
    def leaf(self) -> Tensor:
        """The tensor that gets the weight's gradient, in its dtype."""
        return self.weight if self.float32_weight is None else self.float32_weight

    def detach(self) -> Head:
        """Return the head without a graph."""
        parts = (self.weight, self.bias, self.float32_weight)
        weight, bias, wide = (None if x is None else x.detach() for x in parts)
        assert weight is not None
        return Head(weight, bias, self.scaling, wide)

    def like(self, hidden: Tensor) -> Head:
        """Return the head with its bias in the dtype of `hidden`."""
        return self if self.bias is None else self._replace(bias=self.bias.to(hidden.dtype))


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden or self.weight or self.bias


class Padding:
    """Moves tokens between the packed layout (M,) and the padded one (B, T), T the longest response.

    Only T is read on the host; M is given.
    """

    def __init__(self, lengths: Tensor, packed: int) -> None:  # (B,), M
        longest = int(lengths.max()) if lengths.numel() else 0
        place = torch.arange(longest, device=lengths.device)
        self.mask = place < lengths[:, None]  # (B, T) bool
        rows = torch.arange(len(lengths), device=lengths.device)
        owner = torch.repeat_interleave(rows, lengths, output_size=packed)
        begins = lengths.cumsum(0) - lengths
        # (M,) where each token is in the flattened rows, ascending
        self.at = torch.arange(packed, device=lengths.device) + owner * longest - begins[owner]

    def pad(self, packed: Tensor) -> Tensor:  # (M,) -> (B, T)
        """Lay the tokens out in rows; the padding is 0."""
        grid = packed.new_zeros(self.mask.numel())
        return grid.index_copy(0, self.at, packed).view(self.mask.shape)

    def pack(self, padded: Tensor) -> Tensor:  # (B, T) -> (M,)
        """Take the tokens out of rows again."""
        return padded.reshape(-1)[self.at]

    def pad_inputs(self, inputs: TokenInputs) -> TokenInputs:
        """Lay every per-token tensor out in rows; the mask is then never None."""

        def pad(x: Tensor | None) -> Tensor | None:
            return None if x is None else self.pad(x)

        rows = self.mask.shape[0]
        advantages, ratio = inputs.advantages, inputs.sampling_ratio
        return replace(
            inputs,
            mask=self.mask if inputs.mask is None else self.pad(inputs.mask),
            old_logps=pad(inputs.old_logps),
            ref_logps=pad(inputs.ref_logps),
            sampling_ratio=ratio if ratio is not None and ratio.dim() == 2 else pad(ratio),
            advantages=advantages if advantages is None or len(advantages) == rows else pad(advantages),
        )


class LossArguments(TypedDict, total=False):
    """The keyword arguments of `grpo_rank_loss` that all three forms of the loss take."""

    advantages: Tensor | None
    group_size: int | None
    old_logps: Tensor | None
    ref_logps: Tensor | None
    mask: Tensor | None
    sampling_ratio: Tensor | None
    scores: Tensor | None
    judged: Tensor | None
    weights: Tensor | None
    group_index: Tensor | None
    kind: str
    penalty_weight: float
    scale: str
    score: str
    valid: Tensor | None
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    dual_clip: float | None
    beta: float
    kl: str
    kl_clamp: float | None
    unbiased_kl: bool
    entropy_coef: float
    entropy_aggregate: str
    loss_type: str
    empty_rows: str
    max_completion_length: int | None
    num_items_in_batch: int | float | Tensor | None
    importance_sampling_level: str
    cispo_bound: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    validate: bool


BATCH_TENSORS = (
    "advantages",
    "old_logps",
    "ref_logps",
    "mask",
    "sampling_ratio",
    "scores",
    "group_index",
    "judged",
    "weights",
    "valid",
)
