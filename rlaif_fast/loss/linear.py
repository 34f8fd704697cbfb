"""The chunk driver of every loss on hidden states: hidden -> loss and the gradients of hidden, weight and bias.

For a chunk of rows at a time:

    logits  = hidden @ weight.T (+ bias)                    one matmul
    logits <- d loss / d logits                             the row kernel, in place
    d hidden = d logits @ weight,  d weight += d logits.T @ hidden    two matmuls

A `Close` defines the loss. Where it knows beforehand what each row's gradient needs (`rows`), the row
kernel does a row in one sweep. Where the gradient depends on other rows (on-policy ranking, a ratio of the
whole response, pairs), a chunk holds whole units of responses, their statistics close the loss first, and a
second sweep over the same logits writes the gradient; only a unit that does not fit a chunk has its logits
made twice.

Rows that cannot have a gradient never reach the last two matmuls: masked ones are dropped before the first,
those with a zero gradient (A = 0 or clipped, without KL and entropy) after the row kernel.

Letters: B responses, T tokens, M rows of hidden, m rows that count, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import Head, Needs, Padding, RowInputs, RowStats, TokenGradients
from rlaif_fast.loss.linear_gradients import Gradients
from rlaif_fast.loss.options import LossOptions
from rlaif_fast.loss.vocabulary_shard import VocabularyShard


class Close(Protocol):
    """What turns the log-probabilities of responses into a loss and its gradient."""

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, the tokens that count."""

    @property
    def unit(self) -> int:
        """How many neighbouring responses must be closed together."""

    @property
    def dense(self) -> bool:
        """Whether every row has a gradient, so that there is no search for rows to leave out."""

    @property
    def options(self) -> LossOptions:
        """The options of the row kernel; read where `rows` is not None."""

    def rows(self) -> RowInputs | None:
        """Return what each token (B, T) needs for its gradient, or None where it needs other rows."""

    def close(self, logps: Tensor, entropy: Tensor) -> TokenGradients:  # (B, T)
        """Return the loss of all responses and its gradients."""

    def part(self, responses: slice, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of logps and entropy (b, T) of some responses, as parts of the whole batch."""


def linear_stats_from_rows(
    kernels: Any,  # a module with the row functions (see `backends`)
    hidden: Tensor,  # (M, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    chunk_size: int | None,
) -> RowStats:
    """Return the statistics of every row; one matmul, no logits kept."""
    head, step = head.like(hidden), kernels.chunk_rows(head, chunk_size, 0)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    stats = RowStats(*(hidden.new_empty(hidden.shape[0], dtype=wide) for _ in RowStats._fields))
    for span in _spans(0, hidden.shape[0], step):
        part = kernels.row_stats(_logits(hidden[span], head), token_ids[span], head.scaling.rows(span))
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias for given gradients of logps and entropy; makes the
    logits again."""
    head = head.like(hidden)
    step = kernels.chunk_rows(head, chunk_size, hidden.shape[0] if needs.weight else 0)
    gradients = Gradients(kernels, hidden, head, needs, hidden.shape[0] <= step)
    for span in _spans(0, hidden.shape[0], step):
        logits = _logits(hidden[span], head)
        part = RowStats(*(x[span] for x in stats))
        entropy_part = None if grad_entropy is None else grad_entropy[span]
        scaling = head.scaling.rows(span)
        kernels.row_grad(logits, token_ids[span], scaling, part, grad_logps[span], entropy_part, logits)
        gradients.add(logits, hidden[span], span)
    return gradients.close()


def linear_loss_from_rows(
    kernels: Any,  # a module with the row functions and `rank_loss` (see `backends`)
    hidden: Tensor,  # (M, H), or (B * T, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    padding: Padding | None,  # of the packed layout
    close: Close,
    chunk_size: int | None,
    needs: Needs,
    shard: VocabularyShard | None = None,
) -> tuple[TokenGradients, Tensor | None, Tensor | None, Tensor | None]:
    """Return the closed loss and the gradients of hidden, weight and bias."""
    layout = _layout(close.mask, padding)
    job = _Job(kernels, hidden, head, token_ids, layout, close, chunk_size, needs, shard)
    gradients = Gradients(kernels, hidden, head, needs, len(job.ids) <= job.step)
    rows = close.rows() if needs.any and shard is None else None
    if not needs.any:
        job.statistics()
    elif rows is not None:
        job.one_sweep(gradients, rows)
    else:
        job.two_sweeps(gradients)
    closed = close.close(layout.put(job.logps), layout.put(job.entropy))
    grad_hidden, grad_weight, grad_bias = gradients.close()
    if shard is not None and grad_hidden is not None:
        grad_hidden = shard.sum(grad_hidden)
    return closed, grad_hidden, grad_weight, grad_bias


class _Layout(NamedTuple):
    """Where the rows that count stand, of hidden (M, H) and of the padded grid (B, T)."""

    shape: tuple[int, int]  # (B, T)
    rows: Tensor | None  # (m,) rows of hidden that count; None is all of them
    at: Tensor  # (m,) their positions in the flattened grid, ascending

    def take(self, x: Tensor | None) -> Any:
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
    if padding is None:
        at = mask.reshape(-1).nonzero().squeeze(1)
        return _Layout(shape, None if len(at) == mask.numel() else at, at)
    if mask is padding.mask:  # every token counts
        return _Layout(shape, None, padding.at)
    kept = padding.pack(mask).nonzero().squeeze(1)  # (m,)
    return _Layout(shape, None if len(kept) == len(padding.at) else kept, padding.at[kept])


class _Job:
    """One call of a fused linear loss: the rows that count, and what is known of them so far."""

    def __init__(
        self,
        kernels: Any,
        hidden: Tensor,  # (M, H)
        head: Head,
        token_ids: Tensor,  # (M,)
        layout: _Layout,
        close: Close,
        chunk_size: int | None,
        needs: Needs,
        shard: VocabularyShard | None,
    ) -> None:
        self.kernels = kernels
        self.hidden = hidden
        self.head = head.like(hidden)
        self.scaling = head.scaling.rows(layout.rows)
        self.ids = token_ids if layout.rows is None else token_ids[layout.rows]  # (m,)
        self.layout = layout
        self.close = close
        self.step = kernels.chunk_rows(head, chunk_size, len(self.ids) if needs.weight else 0)
        self.shard = shard
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.logps = hidden.new_zeros(len(layout.at), dtype=wide)  # (m,)
        self.entropy = hidden.new_zeros(len(layout.at), dtype=wide)  # (m,)
        self.buffer: Tensor | None = None

    def logits(self, span: slice) -> tuple[Tensor, Tensor]:
        """Return the logits (n, V) of a span of the rows, in the one buffer, and their hidden states (n,
        H)."""
        hidden = self.hidden[self.layout.hidden_rows(span)]
        if self.buffer is None:
            most = min(self.step, len(self.ids))
            self.buffer = hidden.new_empty(most, self.head.weight.shape[0])
        return _logits(hidden, self.head, self.buffer[: hidden.shape[0]]), hidden

    def keep(self, span: slice, stats: RowStats) -> RowStats:
        """Remember what the loss is closed with."""
        self.logps[span] = stats.logps
        self.entropy[span] = stats.entropy
        return stats

    def evaluate(self, span: slice, logits: Tensor) -> RowStats:
        """Return and remember the statistics of some rows."""
        stats = self.kernels.row_stats(logits, self.local_ids(span), self.scaling.rows(span))
        return self.keep(span, stats if self.shard is None else self.shard.combine(stats))

    def local_ids(self, span: slice) -> Tensor:
        """Return the token ids (n,) of some rows within this process's part of the vocabulary."""
        return self.ids[span] if self.shard is None else self.shard.local(self.ids[span])

    def statistics(self) -> None:
        """Evaluate every row, without a gradient."""
        for span in _spans(0, len(self.ids), self.step):
            self.evaluate(span, self.logits(span)[0])

    def one_sweep(self, gradients: Gradients, inputs: RowInputs) -> None:
        """Statistics and gradient of each row in one sweep over its logits."""
        rows = RowInputs(*(self.layout.take(x) for x in inputs))
        for span in _spans(0, len(self.ids), self.step):
            logits, hidden = self.logits(span)
            stats, grad_logps, _ = self.kernels.row_loss(
                logits, self.ids[span], self.scaling.rows(span), rows.rows(span), self.close.options
            )
            self.keep(span, stats)
            self.add(gradients, logits, hidden, span, grad_logps != 0)

    def two_sweeps(self, gradients: Gradients) -> None:
        """Statistics of whole units of responses first, then their gradient from the same logits."""
        B, T = self.layout.shape
        unit = self.close.unit
        counts = torch.bincount(self.layout.at // (T * unit), minlength=B // unit).tolist()
        for units, rows in _pack(counts, self.step):
            fits = rows.stop - rows.start <= self.step
            parts = []
            for span in _spans(rows.start, rows.stop, self.step):
                logits, hidden = self.logits(span)
                parts.append(self.evaluate(span, logits))
            grad_logps, grad_entropy = self.close_part(slice(units.start * unit, units.stop * unit), rows)
            for span, stats in zip(_spans(rows.start, rows.stop, self.step), parts):
                if not fits:
                    logits, hidden = self.logits(span)
                here = slice(span.start - rows.start, span.stop - rows.start)
                c = grad_logps[here]
                h = None if grad_entropy is None else grad_entropy[here]
                scaling = self.scaling.rows(span)
                self.kernels.row_grad(logits, self.local_ids(span), scaling, stats, c, h, logits)
                self.add(gradients, logits, hidden, span, c != 0)

    def close_part(self, responses: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return the gradients (n,) of the rows of some responses."""
        T = self.layout.shape[1]
        at = self.layout.at[rows] - responses.start * T
        logps = self.logps.new_zeros(responses.stop - responses.start, T)
        entropy = torch.zeros_like(logps)
        logps.view(-1)[at] = self.logps[rows]
        entropy.view(-1)[at] = self.entropy[rows]
        grads = self.close.part(responses, logps, entropy)
        grad_logps, grad_entropy = (None if x is None else x.reshape(-1)[at] for x in grads)
        assert grad_logps is not None
        return grad_logps, grad_entropy

    def add(self, gradients: Gradients, logits: Tensor, hidden: Tensor, span: slice, keep: Tensor) -> None:
        """Add the chunk's gradients, without the rows that have none."""
        rows = self.layout.hidden_rows(span)
        if not self.close.dense:
            kept = int(keep.sum())
            if kept == 0:
                return
            if kept < len(keep):
                where = self.kernels.compact_rows(logits, keep)
                rows = where + span.start if self.layout.rows is None else self.layout.rows[span][where]
                logits, hidden = logits[:kept], hidden[where]
        gradients.add(logits, hidden, rows)


def _spans(first: int, last: int, step: int) -> Iterator[slice]:
    """Cut rows [first, last) into spans of at most `step`."""
    for m in range(first, last, step):
        yield slice(m, min(m + step, last))


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
