"""What a matrix product is computed in, autocast or not."""

from __future__ import annotations

import torch


def dtype_of(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return what a product of tensors of `dtype` is computed in: theirs, or autocast's, which leaves float64 alone."""
    kind = device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else dtype
