"""The C++ kernels for the CPU, as the backend table takes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss import extension
from rlaif_fast.loss.chunks import cpu_chunk_rows as chunk_rows
from rlaif_fast.loss.extension import unavailable
from rlaif_fast.loss.inputs import (
    Head,
    RankAdvantages,
    RankInputs,
    RowInputs,
    RowStats,
    Scaling,
    TokenGradients,
    TokenInputs,
)
from rlaif_fast.loss.linear import (
    linear_grad_from_rows,
    linear_loss_from_rows,
    linear_stats_from_rows,
)
from rlaif_fast.loss.linear_gradients import add_product
from rlaif_fast.loss.options import MAX_GROUP_SIZE, LossOptions, RankOptions
from rlaif_fast.loss.schema import flatten

__all__ = [
    "add_product",
    "chunk_rows",
    "compact_rows",
    "linear_grad",
    "linear_loss",
    "linear_stats",
    "rank_loss",
    "rank_penalty",
    "row_grad",
    "row_loss",
    "row_stats",
    "supports",
    "unavailable",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

extension.load()


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why a call cannot run, or None."""
    if device_type != "cpu":
        return f"the tensors are on {device_type}, not on the CPU"
    return refuses(dtype, group_size, DTYPES)


def refuses(dtype: torch.dtype, group_size: int | None, dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why kernels in C++ for some dtypes cannot run a call, or None."""
    if dtype not in dtypes:
        return f"dtype {dtype} is not one of {', '.join(map(str, dtypes))}"
    if group_size is not None and group_size > MAX_GROUP_SIZE:
        return f"the group size {group_size} is above {MAX_GROUP_SIZE}"
    return None


def _widened_fields(inputs: Any, dtype: torch.dtype) -> Any:
    """Return a holder with every number in `dtype`, as the operators take them."""
    wide = {}
    for field in fields(inputs):
        x = getattr(inputs, field.name)
        wide[field.name] = x if x is None or x.dtype == torch.bool else x.to(dtype)
    return replace(inputs, **wide)


def rank_penalty(inputs: RankInputs, options: RankOptions) -> RankAdvantages:
    """Rank N groups (see `rlaif_fast.loss.reference.rank_penalty.rank_penalty`)."""
    dtype = inputs.scores.dtype
    wide = _widened_fields(inputs, torch.promote_types(dtype, torch.float32))
    dense = (None if x is None else x.contiguous() for x in flatten(wide))
    results = torch.ops.rlaif_fast.rank_penalty(*dense, *flatten(options))
    return RankAdvantages(*(x if x.dtype == torch.bool else x.to(dtype) for x in results))


def rank_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    inputs: TokenInputs,
    options: LossOptions,
) -> TokenGradients:
    """Close the loss over tokens (see `rlaif_fast.loss.reference.rank_loss.rank_loss`)."""
    wide = torch.promote_types(logps.dtype, torch.float32)
    loss, used, stats, grad_logps, grad_entropy = torch.ops.rlaif_fast.token_loss(
        logps.to(wide),
        None if entropy is None else entropy.to(wide),
        *flatten(_widened_fields(inputs, wide), options),
    )
    return TokenGradients(
        loss,
        used if inputs.advantages is None else inputs.advantages,
        stats,
        grad_logps,
        None if entropy is None else grad_entropy,
    )


def _widened_scaling(scaling: Scaling, span: slice, logits: Tensor) -> tuple[Any, ...]:
    """Return the scaling of some rows as the operators take it, temperatures (m,) in the dtype of the statistics."""
    scaling = scaling.rows(span)
    if scaling.temperatures is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        scaling = replace(scaling, temperatures=scaling.temperatures.to(wide).contiguous())
    return flatten(scaling)


def row_stats(
    logits: Tensor,  # (M, V) or (..., V)
    token_ids: Tensor,  # (M,)
    scaling: Scaling,
) -> RowStats:
    """Return log-probability, logsumexp and entropy of each row."""
    ids = token_ids.long()
    parts = [
        (
            span,
            torch.ops.rlaif_fast.row_stats(
                rows, ids[span].contiguous(), *_widened_scaling(scaling, span, logits)
            ),
        )
        for span, (rows,) in _matrices(logits)
    ]
    if len(parts) == 1:
        return RowStats(*parts[0][1])
    stats = RowStats(*(part.new_empty(len(ids)) for part in parts[0][1]))
    for span, part in parts:
        for whole, values in zip(stats, part):
            whole[span] = values
    return stats


def row_grad(
    logits: Tensor,  # (M, V) or (..., V)
    token_ids: Tensor,  # (M,)
    scaling: Scaling,
    stats: RowStats,
    grad_logps: Tensor,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    out: Tensor,  # like logits; may be logits
) -> None:
    """Write the gradient of the logits."""
    ids = token_ids.long()
    for span, (rows, to) in _matrices(logits, out):
        torch.ops.rlaif_fast.row_grad_out(
            rows,
            ids[span].contiguous(),
            *_widened_scaling(scaling, span, logits),
            stats.lse[span].contiguous(),
            stats.entropy[span].contiguous(),
            grad_logps[span].contiguous(),
            None if grad_entropy is None else grad_entropy[span].contiguous(),
            to,
        )


def row_loss(
    logits: Tensor,  # (M, V)
    token_ids: Tensor,  # (M,)
    scaling: Scaling,
    rows: RowInputs,
    options: LossOptions,
) -> tuple[RowStats, Tensor, Tensor]:
    """Overwrite the logits with their gradient of the loss; return statistics and per-row gradients."""
    logps, lse, entropy, grad_logps, grad_entropy = torch.ops.rlaif_fast.row_loss_(
        logits,
        token_ids.long().contiguous(),
        *_widened_scaling(scaling, slice(None), logits),
        *(None if x is None else x.contiguous() for x in rows),
        *flatten(options),
    )
    return RowStats(logps, lse, entropy), grad_logps, grad_entropy


def compact_rows(rows: Tensor, keep: Tensor) -> Tensor:  # (M, V), (M,) bool -> (kept,)
    """Move the kept rows to the front, in order."""
    torch.ops.rlaif_fast.compact_rows_(rows, keep)
    return keep.nonzero().squeeze(1)


def _matrices(*tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Split (..., V) tensors of one shape into matrices whose rows lie one stride apart, without copying.

    A slice like `logits[:, :-1]` is one matrix per response, or one per position where there are fewer positions.
    Yields which rows they are, and the matrix of each tensor.
    """
    x = tensors[0]
    V = x.shape[-1]
    if x.dim() == 1:
        tensors = tuple(y[None] for y in tensors)
    if x.dim() <= 2 or all(y.is_contiguous() for y in tensors):
        yield slice(0, x.numel() // V), tuple(y.view(-1, V) if y.dim() > 2 else y for y in tensors)
        return
    if x.dim() == 3 and x.shape[1] < x.shape[0]:
        for t in range(x.shape[1]):
            yield slice(t, x.shape[0] * x.shape[1], x.shape[1]), tuple(y[:, t] for y in tensors)
        return
    rows = x[0].numel() // V
    for index, parts in enumerate(zip(*tensors)):
        for span, matrices in _matrices(*parts):
            yield slice(index * rows + span.start, index * rows + span.stop, span.step), matrices


def _widened(from_rows: Callable) -> Callable:
    """Give a function of `rlaif_fast.loss.linear` these kernels, and hidden states and weights of at least 32 bits:
    without matrix units for 16, float32 is faster, and exact."""

    def run(hidden: Tensor, head: Head, token_ids: Tensor, *rest: Any) -> Any:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        widened = head._replace(weight=head.weight.to(wide))
        return from_rows(sys.modules[__name__], hidden.to(wide), widened, token_ids.long(), *rest)

    return run


linear_stats = _widened(linear_stats_from_rows)
linear_grad = _widened(linear_grad_from_rows)
linear_loss = _widened(linear_loss_from_rows)
