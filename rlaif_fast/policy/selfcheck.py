"""Checks, before an attention backend is used, that it equals the dense reference on this very GPU.

The kernels inside PyTorch are called below their public functions, so their arguments may change with a release. A
small ragged case, forward and backward, takes milliseconds and decides whether "auto" may use them.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.errors import typed_line
from rlaif_fast.policy.packing import PackedRow, pack

if TYPE_CHECKING:
    from rlaif_fast.policy.attention import AttentionBackend

# Both sides round their inputs and outputs to the dtype; sums are float32. Relative l2 distance.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
HEADS, KEY_HEADS = 4, 2
HEAD_SIZE = 64  # if no model says another


def ragged_row(merge: str) -> PackedRow:
    """Three prompts of unequal length with three, two and one responses of unequal length, one of them a repeat.

    The last response is one token, which is not fed, so only the prompt itself attends to its prompt.
    """
    token_ids = np.array(
        [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [1, 2, 3, 4, 0], [3, 1, 0, 0, 0], [3, 1, 0, 0, 0], [2, 0, 0, 0, 0]]
    )
    lengths, prompts, sizes = np.array([5, 3, 4, 2, 2, 1]), np.array([37, 5, 70]), np.array([3, 2, 1])
    return pack(token_ids, lengths, prompts, sizes, merge=merge)  # type: ignore[arg-type]


def check_attention(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_size: int = HEAD_SIZE
) -> str | None:
    """Return why a backend must not be used on a device, dtype and head size, or None; checked once."""
    return _check(backend.name, device, dtype, head_size)[0]


def describe_check(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_size: int
) -> str:
    """Return, for the log, that `check_attention` passed, and how many milliseconds it took."""
    return (
        f"equals the reference, checked in {1000 * _check(backend.name, device, dtype, head_size)[1]:.0f} ms"
    )


@cache
def _check(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str | None, float]:
    from rlaif_fast.policy.attention import ATTENTION_BACKENDS, ReferenceContext

    backend, start = ATTENTION_BACKENDS[name], time.perf_counter()
    row = ragged_row(backend.merge)
    try:
        results = _run(backend.context(row, device), row, device, dtype, head_size)
    except Exception as error:  # a kernel of another release may raise anything
        return f"it fails here ({typed_line(error)[:160]})", _since(start)
    expected = _run(ReferenceContext(row, device), row, device, torch.float32, head_size)
    for what, ours, reference in zip(("output", "dq", "dk", "dv"), results, expected):
        distance = float((ours.detach().float() - reference.detach()).norm() / reference.detach().norm())
        if not distance < TOLERANCE.get(dtype, 1e-4):  # NaN never passes
            return f"its {what} is off by {distance:.1e} of the reference", _since(start)
    return None, _since(start)


def _run(
    context, row: PackedRow, device: torch.device, dtype: torch.dtype, head_size: int
) -> tuple[Tensor, ...]:
    """Output and gradients of random queries, keys and values, the same draws for every dtype."""
    generator = torch.Generator().manual_seed(0)
    length = int(row.group_lengths.sum())
    inputs = []
    for heads in (HEADS, KEY_HEADS, KEY_HEADS):
        x = torch.randn(1, heads, length, head_size, generator=generator).to(torch.bfloat16)
        inputs.append(x.to(device, dtype).requires_grad_())
    output = context.attend(0, *inputs, head_size**-0.5)
    weights = torch.randn(output.shape, generator=generator).to(torch.bfloat16).to(device, dtype)
    return output, *torch.autograd.grad(output, inputs, weights)


def _since(start: float) -> float:
    return time.perf_counter() - start
