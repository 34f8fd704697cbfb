"""What the tests of the Triton kernels share: where they run, tolerances, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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
