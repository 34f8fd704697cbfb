"""The C++ kernels for CUDA devices as a row of the backend table."""

from __future__ import annotations

import torch


def unavailable() -> str | None:
    """Return why the extension cannot run, or None."""
    return "the extension rlaif_fast._C is not built"


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why a call cannot run, or None."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}, not on a CUDA device"
    return None
