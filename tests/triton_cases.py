"""What the tests of the Triton kernels share: where they run, tolerances, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from rlaif_fast_kernels.launch import INTERPRETED

# The same test bodies run in the interpreter on the CPU, or compiled on a GPU.
DEVICE = "cpu" if INTERPRETED else "cuda"

# Relative to the float64 reference of the same inputs. A gradient in a 16-bit dtype carries the rounding of
# its output; the interpreter truncates to bfloat16 where the device rounds to nearest, which doubles that.
LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3, torch.float16: 4e-3}


def error(x: Tensor, reference: Tensor) -> float:
    """Return the l2 distance relative to the reference; inf where one is finite and the other is not."""
    if not torch.equal(x.isfinite(), reference.isfinite()):
        return float("inf")
    x, reference = x.double().nan_to_num(), reference.double().nan_to_num()
    distance, size = (x - reference).norm().item(), reference.norm().item()
    return distance / size if size else distance


def wide(x: Tensor | None) -> Tensor | None:
    """Return a float64 copy of a floating point tensor, anything else as it is."""
    return x.double() if x is not None and x.is_floating_point() else x


def uninitialised_memory_is_nan() -> Iterator[None]:
    """Have torch.empty and its kin return NaN, so that nothing passes by reading what was never written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _next_larger(values: np.ndarray, every: int) -> np.ndarray:
    if values.dtype != np.float32:
        return values
    moved = np.arange(values.size).reshape(values.shape) % every == every - 1
    return np.where(moved & (values != 0), np.nextafter(values, np.float32(np.inf)), values)


def round_as_compiled(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Let the interpreter's `/` and `tl.sqrt` give the next larger number, at every so many of a block's places.

    Compiled they are off by a bit. On a GPU they are the device's own.
    """
    if INTERPRETED:
        divide = partialmethod(
            InterpreterBuilder.binary_op, op=lambda x, y: _next_larger(np.divide(x, y), every)
        )
        root = partialmethod(InterpreterBuilder.unary_op, op=lambda x: _next_larger(np.sqrt(x), every))
        monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)
        monkeypatch.setattr(InterpreterBuilder, "create_sqrt", root)
