"""The fused linear loss on a GPU: hidden states -> loss and the gradients of hidden, weight and bias.

    logits  = hidden @ weight.T (+ bias)                      one matmul a chunk of rows
    logits <- d loss / d logits                               `row_loss`, in place
    d hidden = d logits @ weight,   d weight += d logits.T @ hidden      two matmuls, the sum in float32

`rlaif_fast.loss.linear` drives the chunks, `rlaif_fast.loss.chunks` sets their size; this file holds the rest that is
particular to a GPU: how the weight's gradient is summed, and how rows without gradient leave a chunk.
`compact_rows_kernel` moves only as many rows as were dropped from the front: kept rows of the tail fill the holes, so
that sources and holes never overlap and nothing is buffered. It needs the number of kept rows on the host: one
synchronisation a chunk, and only where rows can drop out. Never materialised: logits of more than a chunk, a
second copy of a chunk. bfloat16 or float16 logits, float32 inside the row kernel and in the weight's gradient.

Letters: M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast.loss.chunks import gpu_chunk_rows as chunk_rows
from rlaif_fast.loss.linear import linear_grad_from_rows, linear_loss_from_rows, linear_stats_from_rows
from rlaif_fast_kernels.launch import AotConfig, refuse, unavailable
from rlaif_fast_kernels.logits_loss import row_grad, row_loss, row_stats
from rlaif_fast_kernels.rank_loss import rank_loss

__all__ = [
    "add_product",
    "aot_configs",
    "chunk_rows",
    "compact_rows",
    "linear_grad",
    "linear_loss",
    "linear_stats",
    "rank_loss",
    "row_grad",
    "row_loss",
    "row_stats",
    "supports",
    "unavailable",
]

SLAB = 16384  # rows of the weight's gradient a product, where a product cannot be summed in place
BLOCK_V = 4096
NUM_WARPS = 8


@triton.jit
def compact_rows_kernel(
    rows,  # (M, V)
    sources,  # (moves,) rows of the tail that stay
    holes,  # (moves,) rows of the front that go
    V,
    stride_m,
    BLOCK_V: tl.constexpr,
):
    move = tl.program_id(0)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    source = tl.load(sources + move).to(tl.int64)
    hole = tl.load(holes + move).to(tl.int64)
    x = tl.load(rows + source * stride_m + offs_v, mask=offs_v < V)
    tl.store(rows + hole * stride_m + offs_v, x, mask=offs_v < V)


def compact_rows(
    rows: Tensor,  # (M, V)
    keep: Tensor,  # (M,) bool
) -> Tensor:  # (kept,)
    """Bring the kept rows to the front, in place; return which row now stands at each place there."""
    kept = keep.nonzero().squeeze(1)
    count = kept.numel()
    front = keep[:count]
    holes = (~front).nonzero().squeeze(1)
    sources = kept[count - holes.numel() :]  # as many kept rows follow the front as there are holes in it
    if holes.numel():
        V = rows.shape[1]
        with torch.cuda.device_of(rows):
            compact_rows_kernel[(holes.numel(), triton.cdiv(V, BLOCK_V))](
                rows, sources, holes, V, rows.stride(0), BLOCK_V=BLOCK_V, num_warps=NUM_WARPS
            )
    order = torch.arange(count, device=rows.device)
    order[holes] = sources
    return order


def add_product(
    total: Tensor,  # (V, H) float32
    grad_logits: Tensor,  # (m, V)
    hidden: Tensor,  # (m, H)
    first: bool,
) -> None:
    """Add grad_logits.T @ hidden to total, or with `first` write it there."""
    a, beta = grad_logits.t(), 0 if first else 1
    if total.dtype == a.dtype:
        total.addmm_(a, hidden, beta=beta)
    elif sums_in_float32(total.device, a.dtype):
        torch.addmm(total, a, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:  # each product is rounded to its own dtype once; the sum of them is float32 all the same
        for v in range(0, total.shape[0], SLAB):
            product = a[v : v + SLAB] @ hidden
            part = total[v : v + SLAB]
            part.copy_(product) if first else part.add_(product)


@functools.cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this PyTorch adds a product of 16-bit matrices to a float32 matrix on this device."""
    a = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


linear_stats = functools.partial(linear_stats_from_rows, sys.modules[__name__])
linear_grad = functools.partial(linear_grad_from_rows, sys.modules[__name__])
linear_loss = functools.partial(linear_loss_from_rows, sys.modules[__name__])


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why the kernels cannot take such hidden states, or None."""
    return refuse("hidden", device_type, dtype, group_size)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles."""
    types = {
        "rows": "*bf16:16",
        "sources": "*i64:16",
        "holes": "*i64:16",
        "V": "i32:16",
        "stride_m": "i32:16",
    }
    return [AotConfig(compact_rows_kernel, types, {"BLOCK_V": BLOCK_V}, NUM_WARPS, 1, "bf16")]
