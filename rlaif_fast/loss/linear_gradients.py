"""The gradients of hidden states, weight and bias, added up over the chunks of the fused linear loss.

Letters: M rows, m rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import Head, Needs

SUM_LENGTH = 8192  # terms that a float32 matmul adds up before the parts are added


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
    """The gradients so far. That of the weight is written once in its final dtype where one chunk is all there
    is, and summed in float32 or wider otherwise."""

    def __init__(
        self,
        kernels: Any,
        hidden: Tensor,  # (M, H)
        head: Head,
        needs: Needs,
        one_chunk: bool,
    ) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_weight = head.leaf.dtype if one_chunk else wide
        self.kernels = kernels
        self.head = head
        # Contiguous however the inputs lie: the kernel that scales them walks over memory.
        self.hidden = hidden.new_zeros(hidden.shape) if needs.hidden else None
        self.weight = head.weight.new_empty(head.weight.shape, dtype=of_weight) if needs.weight else None
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
