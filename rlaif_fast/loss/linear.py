"""The fused linear loss from row kernels: hidden states -> loss and the gradients of hidden, weight and bias.

For a chunk of rows at a time:

    logits  = hidden @ weight.T (+ bias)                    one matmul
    logits <- d loss / d logits                             the row kernel, in place
    d hidden = d logits @ weight,  d weight += d logits.T @ hidden    two matmuls

The gradient of a row needs its log-probability, its entropy and its advantage. Where the advantages are known
beforehand (given, or ranked by `old_logps`), the row kernel does it in one sweep. Where they depend on the
policy that is being evaluated (on-policy ranking) or the ratio depends on the whole response (sequence
level), a chunk holds whole groups or responses, their statistics close the loss first, and a second sweep
over the same logits writes the gradient; only a group that does not fit a chunk has its logits made twice.

Rows that cannot have a gradient never reach the last two matmuls: masked ones are dropped before the first,
those with a zero gradient (A = 0 or clipped, without KL and entropy) after the row kernel.

Letters: N groups, G responses a group, B = N * G, T tokens, M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlaif_fast.loss.backends import RowInputs, RowStats
from rlaif_fast.loss.inputs import Padding, TokenInputs
from rlaif_fast.loss.options import LossOptions
from rlaif_fast.loss.reference.rank_loss import token_weights
from rlaif_fast.loss.vocabulary_shard import VocabularyShard

# Bytes of logits in memory at once: large enough that the matmuls run at full speed and the weight's gradient
# is read and written few times, small beside that gradient itself.
CHUNK_BYTES = 64 << 20
MIN_CHUNK_ROWS = 64
SUM_LENGTH = 8192  # terms that a float32 matmul adds up before the parts are added


class Head(NamedTuple):
    """The last layer: logits = hidden @ weight.T + bias, divided by the temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: float


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


def chunk_rows(weight: Tensor, chunk_size: int | None) -> int:
    """Return how many rows of logits are in memory at once."""
    if chunk_size is not None:
        return chunk_size
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))


def add_product(
    total: Tensor,  # (V, H) float32 or wider
    grad_logits: Tensor,  # (m, V)
    hidden: Tensor,  # (m, H)
    first: bool,
) -> None:
    """Add grad_logits.T @ hidden to total, or with `first` write it there."""
    if grad_logits.dtype == total.dtype:
        total.addmm_(grad_logits.t(), hidden, beta=0 if first else 1)
    else:
        product = grad_logits.t() @ hidden
        total.copy_(product) if first else total.add_(product)


class Gradients:
    """The gradients of hidden, weight and bias, accumulated chunk by chunk; float32 or wider for the last
    two."""

    def __init__(self, kernels: Any, hidden: Tensor, head: Head, needs: Needs) -> None:  # hidden (M, H)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.kernels = kernels
        self.head = head
        self.hidden = torch.zeros_like(hidden) if needs.hidden else None
        self.weight = torch.empty_like(head.weight, dtype=wide) if needs.weight else None
        self.bias = hidden.new_zeros(head.weight.shape[0], dtype=wide) if needs.bias else None
        self._first = True

    def add(
        self,
        grad_logits: Tensor,  # (m, V)
        hidden: Tensor,  # (m, H)
        rows: Tensor | slice,  # (m,) where these rows of hidden stand
    ) -> None:
        """Add one chunk. The rows of hidden are each written once."""
        if self.hidden is not None:
            if isinstance(rows, slice):
                _product(grad_logits, self.head.weight, self.hidden[rows])
            else:
                self.hidden[rows] = _product(grad_logits, self.head.weight, torch.empty_like(hidden))
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)
        if self.weight is not None:
            self.kernels.add_product(self.weight, grad_logits, hidden, self._first)
            self._first = False

    def close(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients; a weight that met no row has a zero gradient."""
        if self.weight is not None and self._first:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:  # (m, V), (V, H) -> (m, H)
    """Write a @ b into out. V is long and the terms largely cancel: sums of float32 are taken in parts."""
    part = SUM_LENGTH if out.dtype.itemsize >= 4 else a.shape[1]
    torch.mm(a[:, :part], b[:part], out=out)
    for v in range(part, a.shape[1], part):
        out += a[:, v : v + part] @ b[v : v + part]
    return out


class _Layout(NamedTuple):
    """Where the rows that count stand, of hidden (M, H) and of the padded grid (B, T)."""

    shape: tuple[int, int]  # (B, T)
    rows: Tensor | None  # (m,) rows of hidden that count; None is all of them
    at: Tensor  # (m,) their positions in the flattened grid, ascending

    def take(self, x: Tensor | None) -> Tensor | None:
        """Return the entries (m,) of a (B, T) or (B, 1) tensor that belong to the rows."""
        if x is None:
            return None
        return x.expand(self.shape).reshape(-1)[self.at]

    def put(self, x: Tensor) -> Tensor:  # (m,) -> (B, T)
        """Lay the entries of the rows out in the grid, 0 elsewhere."""
        grid = x.new_zeros(self.shape)
        grid.view(-1)[self.at] = x
        return grid

    def hidden_rows(self, span: slice) -> Tensor | slice:
        """Return the index of a span of the rows into hidden."""
        return span if self.rows is None else self.rows[span]


def _layout(mask: Tensor, padding: Padding | None) -> _Layout:  # mask (B, T) bool
    shape = (mask.shape[0], mask.shape[1])
    at = mask.reshape(-1).nonzero().squeeze(1)
    if padding is None:
        rows = None if len(at) == mask.numel() else at
    else:
        kept = padding.pack(mask)  # (M,)
        rows = None if len(at) == len(kept) else kept.nonzero().squeeze(1)
    return _Layout(shape, rows, at)


def _valid_rows(inputs: TokenInputs, mask: Tensor) -> Tensor:  # (B,) bool
    if inputs.valid is None:
        return mask.new_ones(mask.shape[0])
    assert inputs.group_size is not None
    return inputs.valid.repeat_interleave(inputs.group_size)


def _response_mask(inputs: TokenInputs, like: Tensor, shape: tuple[int, int]) -> Tensor:  # (B, T) bool
    mask = like.new_ones(shape, dtype=torch.bool) if inputs.mask is None else inputs.mask
    return mask & _valid_rows(inputs, mask)[:, None]


def linear_stats_from_rows(
    kernels: Any,  # row_stats, row_grad, row_loss
    hidden: Tensor,  # (M, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    chunk_size: int | None,
    shard: VocabularyShard | None = None,
) -> RowStats:
    """Return the statistics of every row; one matmul, no logits kept."""
    step = kernels.chunk_rows(head.weight, chunk_size)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    stats = RowStats(*(hidden.new_empty(hidden.shape[0], dtype=wide) for _ in RowStats._fields))
    for m in range(0, hidden.shape[0], step):
        span = slice(m, m + step)
        part = _stats(kernels, _logits(hidden[span], head), token_ids[span], head, shard)
        for whole, values in zip(stats, part):
            whole[span] = values
    return stats


def linear_grad_from_rows(
    kernels: Any,
    hidden: Tensor,  # (M, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    stats: RowStats,
    grad_logps: Tensor,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    chunk_size: int | None,
    needs: Needs,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias for given gradients of logps and entropy; makes the
    logits again."""
    step = kernels.chunk_rows(head.weight, chunk_size)
    gradients = Gradients(kernels, hidden, head, needs)
    for m in range(0, hidden.shape[0], step):
        span = slice(m, min(m + step, hidden.shape[0]))
        logits = _logits(hidden[span], head)
        part = RowStats(*(x[span] for x in stats))
        entropy_part = None if grad_entropy is None else grad_entropy[span]
        _write_grad(kernels, logits, token_ids[span], head, part, grad_logps[span], entropy_part, shard)
        gradients.add(logits, hidden[span], span)
    return _close(gradients, shard)


def linear_loss_from_rows(
    kernels: Any,  # a module that provides `linear_loss` (see `backends`)
    hidden: Tensor,  # (M, H), or (B * T, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    shape: tuple[int, int],  # (B, T)
    padding: Padding | None,  # of the packed layout
    inputs: TokenInputs,  # padded
    options: LossOptions,
    chunk_size: int | None,
    needs: Needs,
    shard: VocabularyShard | None = None,
) -> tuple[Any, Tensor | None, Tensor | None, Tensor | None]:
    """Return the closed loss (see `TokenGradients`) and the gradients of hidden, weight and bias."""
    layout = _layout(_response_mask(inputs, hidden, shape), padding)
    step = kernels.chunk_rows(head.weight, chunk_size)
    job = _Job(kernels, hidden, head, token_ids, layout, inputs, options, step, shard)
    gradients = Gradients(kernels, hidden, head, needs)
    if not needs.any:
        job.statistics()
    elif job.advantages_known and shard is None:
        job.one_sweep(gradients)
    else:
        job.two_sweeps(gradients)
    closed = job.close_loss()
    return (closed, *_close(gradients, shard))


class _Job:
    """One call of the fused linear loss: the rows that count, and what is known of them so far."""

    def __init__(
        self,
        kernels: Any,
        hidden: Tensor,  # (M, H)
        head: Head,
        token_ids: Tensor,  # (M,)
        layout: _Layout,
        inputs: TokenInputs,
        options: LossOptions,
        step: int,
        shard: VocabularyShard | None,
    ) -> None:
        self.kernels = kernels
        self.hidden = hidden
        self.head = head
        self.ids = token_ids if layout.rows is None else token_ids[layout.rows]  # (m,)
        self.layout = layout
        self.inputs = inputs
        self.options = options
        self.step = step
        self.shard = shard
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.logps = hidden.new_zeros(len(layout.at), dtype=wide)  # (m,)
        self.entropy = hidden.new_zeros(len(layout.at), dtype=wide)  # (m,)
        self.buffer: Tensor | None = None

    @property
    def advantages_known(self) -> bool:
        """Whether a row's gradient needs nothing of the other rows that are being evaluated."""
        known = (
            self.inputs.advantages is not None
            or self.inputs.old_logps is not None
            or self.options.kind in ("oracle", "zscore")
        )
        return known and self.options.importance_sampling_level == "token"

    def logits(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return the logits (n, V) of a span of the rows, in the one buffer, and their hidden states (n,
        H)."""
        hidden = self.hidden[self.layout.hidden_rows(span)]
        if self.buffer is None:
            most = min(self.step, len(self.ids))
            self.buffer = hidden.new_empty(most, self.head.weight.shape[0])
        return _logits(hidden, self.head, self.buffer[: hidden.shape[0]]), hidden

    def keep(self, span: slice, stats: RowStats) -> None:
        """Remember what the loss is closed with."""
        self.logps[span] = stats.logps
        self.entropy[span] = stats.entropy

    def spans(self, first: int, last: int) -> Iterator[slice]:
        """Cut rows [first, last) into spans of at most one chunk."""
        for m in range(first, last, self.step):
            yield slice(m, min(m + self.step, last))

    def statistics(self) -> None:
        """Evaluate every row, without a gradient."""
        for span in self.spans(0, len(self.ids)):
            logits, _ = self.logits(span)
            self.keep(span, _stats(self.kernels, logits, self.ids[span], self.head, self.shard))

    def one_sweep(self, gradients: Gradients) -> None:
        """Statistics and gradient of each row in one sweep over its logits."""
        rows = self._row_inputs()
        for span in self.spans(0, len(self.ids)):
            logits, hidden = self.logits(span)
            part = RowInputs(*(None if x is None else x[span] for x in rows))  # type: ignore[arg-type]
            stats, grad_logps, _ = self.kernels.row_loss(
                logits, self.ids[span], self.head.temperature, part, self.options
            )
            self.keep(span, stats)
            self._add(gradients, logits, hidden, span, grad_logps != 0)

    def two_sweeps(self, gradients: Gradients) -> None:
        """Statistics of whole groups (or responses) first, then their gradient from the same logits."""
        unit = self.inputs.group_size or 1  # responses that are closed together
        B, T = self.layout.shape
        counts = torch.bincount(self.layout.at // (T * unit), minlength=B // unit).tolist()
        for units, rows in _pack(counts, self.step):
            responses = slice(units.start * unit, units.stop * unit)
            fits = rows.stop - rows.start <= self.step
            parts = []
            for span in self.spans(rows.start, rows.stop):
                logits, hidden = self.logits(span)
                parts.append(_stats(self.kernels, logits, self.ids[span], self.head, self.shard))
                self.keep(span, parts[-1])
            grad_logps, grad_entropy = self._close_part(responses, rows)
            for span, stats in zip(self.spans(rows.start, rows.stop), parts):
                if not fits:
                    logits, hidden = self.logits(span)
                here = slice(span.start - rows.start, span.stop - rows.start)
                c = grad_logps[here]
                h = None if grad_entropy is None else grad_entropy[here]
                _write_grad(self.kernels, logits, self.ids[span], self.head, stats, c, h, self.shard)
                self._add(gradients, logits, hidden, span, c != 0)

    def close_loss(self) -> Any:
        """Close the whole loss over the statistics of every row."""
        put = self.layout.put
        return self._close(self.inputs, put(self.logps), put(self.entropy))

    def _close(self, inputs: TokenInputs, logps: Tensor, entropy: Tensor) -> Any:
        return self.kernels.rank_loss(
            logps,
            inputs.advantages,
            inputs.oracle_ranks,
            inputs.valid,
            inputs.old_logps,
            inputs.ref_logps,
            inputs.mask,
            inputs.sampling_ratio,
            entropy,
            inputs.num_items,
            self.options,
        )

    def _close_part(self, responses: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return the gradients (n,) of the rows of some responses, weighed as parts of the whole batch."""
        T = self.layout.shape[1]
        part = self.inputs.responses(responses)._replace(num_items=self._items())
        at = self.layout.at[rows] - responses.start * T
        logps = self.logps.new_zeros(responses.stop - responses.start, T)
        entropy = torch.zeros_like(logps)
        logps.view(-1)[at] = self.logps[rows]
        entropy.view(-1)[at] = self.entropy[rows]
        closed = self._close(part, logps, entropy)
        grad_entropy = None if self.options.entropy_coef == 0.0 else closed.grad_entropy.view(-1)[at]
        return closed.grad_logps.reshape(-1)[at], grad_entropy

    def _items(self) -> Tensor:  # scalar
        """Return what the aggregate of the whole batch divides by."""
        if self.inputs.num_items is not None:
            return self.inputs.num_items
        if self.options.loss_type == "dapo":
            return self.logps.new_tensor(float(len(self.layout.at)))
        responses = _valid_rows(self.inputs, self.logps.new_ones(self.layout.shape, dtype=torch.bool))
        return responses.sum().to(self.logps.dtype)

    def _row_inputs(self) -> RowInputs:
        """Return what each row needs to know, where the advantages do not depend on the rows."""
        shape = self.layout.shape
        inputs, wide = self.inputs, self.logps.dtype
        mask = _response_mask(inputs, self.hidden, shape)
        if inputs.advantages is None:  # the ranking needs the old log-probabilities, or none at all
            old = mask.new_zeros(shape, dtype=wide) if inputs.old_logps is None else inputs.old_logps.to(wide)
            advantages = self._close(inputs, old, torch.zeros_like(old)).advantages
        else:
            advantages = inputs.advantages
        advantages = advantages.to(wide)
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        valid = _valid_rows(inputs, mask)
        weights = token_weights(mask, mask.sum(-1), valid, inputs.num_items, self.options, wide)

        def take(x: Tensor | None) -> Any:
            return None if x is None else self.layout.take(x.to(wide))

        return RowInputs(
            take(advantages),
            take(weights),
            take(inputs.old_logps),
            take(inputs.ref_logps),
            take(inputs.sampling_ratio),
        )

    def _add(self, gradients: Gradients, logits: Tensor, hidden: Tensor, span: slice, keep: Tensor) -> None:
        """Add the chunk's gradients, without the rows that have none."""
        rows = self.layout.hidden_rows(span)
        if self.options.beta == 0.0 and self.options.entropy_coef == 0.0:  # else every row has a gradient
            kept = int(keep.sum())
            if kept == 0:
                if gradients.hidden is not None and isinstance(rows, slice):
                    gradients.hidden[rows] = 0.0
                return
            if kept < len(keep):
                where = self.kernels.compact_rows(logits, keep)
                rows = where + span.start if self.layout.rows is None else self.layout.rows[span][where]
                logits, hidden = logits[:kept], hidden[where]
        gradients.add(logits, hidden, rows)


def _pack(counts: list[int], limit: int) -> Iterator[tuple[slice, slice]]:
    """Pack consecutive units into chunks of at most `limit` rows; a larger unit stands alone.

    Yields:
        The units and the rows of each chunk.
    """
    unit = row = 0
    while unit < len(counts):
        last, rows = unit + 1, counts[unit]
        while last < len(counts) and rows + counts[last] <= limit:
            rows += counts[last]
            last += 1
        if rows:
            yield slice(unit, last), slice(row, row + rows)
        unit, row = last, row + rows


def _logits(hidden: Tensor, head: Head, out: Tensor | None = None) -> Tensor:  # (m, H) -> (m, V)
    if head.bias is None:
        return torch.mm(hidden, head.weight.t(), out=out)
    return torch.addmm(head.bias, hidden, head.weight.t(), out=out)


def _stats(
    kernels: Any, logits: Tensor, token_ids: Tensor, head: Head, shard: VocabularyShard | None
) -> RowStats:
    if shard is None:
        return kernels.row_stats(logits, token_ids, head.temperature)
    return shard.combine(kernels.row_stats(logits, shard.local(token_ids), head.temperature))


def _write_grad(
    kernels: Any,
    logits: Tensor,  # (m, V), overwritten
    token_ids: Tensor,  # (m,)
    head: Head,
    stats: RowStats,
    grad_logps: Tensor,  # (m,)
    grad_entropy: Tensor | None,  # (m,)
    shard: VocabularyShard | None,
) -> None:
    ids = token_ids if shard is None else shard.local(token_ids)
    kernels.row_grad(logits, ids, head.temperature, stats, grad_logps, grad_entropy, logits)


def _close(
    gradients: Gradients, shard: VocabularyShard | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, weight, bias = gradients.close()
    if shard is not None and hidden is not None:
        hidden = shard.sum(hidden)
    return hidden, weight, bias
