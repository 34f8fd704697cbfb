"""Checks of the arguments of the public functions: each failure names the argument, what was expected and
what came.

Checks of values read the data. On an accelerator that is one synchronisation a call; they are skipped while
torch.compile traces and while a CUDA graph is captured, where the kernels still guard every read by id.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """Say what `value` is, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None) -> None:
    """Raise unless `value` is a tensor of `shape` (a letter stands for any size) on the device of `like`."""
    expected = f"a tensor of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}; got {describe(value)}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, value.shape)
    )
    if not fits:
        raise ValueError(f"{name} must be {expected}; got {describe(value)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors; got {describe(value)}")


def floating(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None) -> None:
    """Raise unless `value` is a floating point tensor (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype; got {describe(value)}")


def token_ids(name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor) -> None:
    """Raise unless `value` is an int64 or int32 tensor (see `tensor`)."""
    tensor(name, value, shape, like=like)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32; got {describe(value)}")


def can_read(x: Tensor) -> bool:
    """Return whether values may be looked at: not while tracing, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def finite_ranks(name: str, value: Tensor, valid: Tensor | None, *, negative: bool) -> None:
    """Raise if a rank of a valid group is NaN, infinite, or (unless `negative`) below 0."""
    if not can_read(value) or not value.numel():
        return
    low, high = value.aminmax()  # one pass; NaN comes through
    if low.isfinite() and high.isfinite() and (negative or low >= 0):
        return
    bad = ~value.isfinite() if negative else ~(value.isfinite() & (value >= 0))
    if valid is not None:
        bad = bad & valid[:, None]
    if bad.any():
        n, g = bad.nonzero()[0].tolist()
        expected = "finite" if negative else "finite and at least 0"
        raise ValueError(f"{name} must be {expected}; got {value[n, g].item()} at [{n}, {g}]")


def ids_in_range(name: str, ids: Tensor, vocabulary: int, mask: Tensor | None) -> None:
    """Raise if the id of an unmasked token is outside [0, vocabulary)."""
    if not can_read(ids):
        return
    bad = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        bad = bad & mask
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} must be in [0, {vocabulary}); got {ids[tuple(at)].item()} at {at}")


def not_nan(name: str, value: Tensor, valid: Tensor | None) -> None:
    """Raise if a score of a valid group is NaN, which has no place in an order."""
    if not can_read(value) or not value.numel() or not value.amax().isnan():
        return
    bad = value.isnan() if valid is None else value.isnan() & valid[:, None]
    if bad.any():
        raise ValueError(f"{name} must not be NaN; got NaN at {bad.nonzero()[0].tolist()}")


def zero_or_one(name: str, value: Tensor) -> None:
    """Raise if a mask that is not bool holds anything but 0 and 1."""
    if can_read(value) and not ((value == 0) | (value == 1)).all():
        raise ValueError(f"{name} must be bool or hold only 0 and 1; got other values")
