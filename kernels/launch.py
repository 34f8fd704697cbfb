"""What every launcher shares: where Triton can run, and how a kernel file declares what is compiled ahead."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.torch_version import TorchVersion

from rlaif_fast.loss.options import MAX_GROUP_SIZE

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as Triton itself reads it, at import
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AotConfig(NamedTuple):
    """One production configuration of a kernel, for `rlaif_fast_kernels.aot_report`.

    Attributes:
        kernel: The `triton.jit` function.
        signature: Parameter name -> Triton type; ":16" after a type promises divisibility by 16. Parameters
            named in `constexprs` are left out.
        constexprs: Parameter name -> compile-time value; None for an optional tensor that is absent.
        num_warps, num_stages: Launch options.
        label: What tells it from the kernel's other configurations.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    label: str


def unavailable() -> str | None:
    """Return why Triton kernels cannot run on this machine, or None."""
    if INTERPRETED:
        return _refuses_numpy()
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 in the environment runs Triton's interpreter, for tests)"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0 or later; got {capability[0]}.{capability[1]}"
    return None


def _refuses_numpy() -> str | None:
    """Before Triton 3.7 the interpreter took arrays of one element for numbers, which NumPy 2.4 no longer allows."""
    import triton

    if TorchVersion(triton.__version__) < (3, 7) and TorchVersion(np.__version__) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}; "
            "install numpy<2.4"
        )
    return None


def refuse(what: str, device_type: str, dtype: torch.dtype, group_size: int | None = None) -> str | None:
    """Return why no Triton kernel takes such a tensor (named `what`) or group size, or None."""
    if dtype not in DTYPES:
        return f"{what} must be float32, bfloat16 or float16; got {dtype}"
    if group_size is not None and not 1 <= group_size <= MAX_GROUP_SIZE:
        return f"the group size must be 1 to {MAX_GROUP_SIZE}; got {group_size}"
    if device_type != ("cpu" if INTERPRETED else "cuda"):
        return f"the tensors are on {device_type}; Triton runs on cuda, or on cpu with TRITON_INTERPRET=1"
    return None
