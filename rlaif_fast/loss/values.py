"""Checks of what tensors hold: each failure names the argument, what was expected and what came.

They read the data. On an accelerator that is one synchronisation a call; they are skipped while torch.compile traces
and while a CUDA graph is captured, where the kernels still guard every read by id.
"""

from __future__ import annotations

import torch
from torch import Tensor


def can_read(x: Tensor, validate: bool = True) -> bool:
    """Return whether values may be looked at: not while tracing, nor while a CUDA graph is captured."""
    if not validate or torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def finite_ranks(name: str, value: Tensor, judged: Tensor | None, *, negative: bool) -> None:
    """Raise if a rank that counts is NaN, infinite, or (unless `negative`) below 0."""
    if not value.numel():
        return
    low, high = value.aminmax()  # one pass; NaN comes through
    if low.isfinite() and high.isfinite() and (negative or low >= 0):
        return
    bad = ~value.isfinite() if negative else ~(value.isfinite() & (value >= 0))
    if judged is not None:
        bad = bad & judged
    if bad.any():
        n, g = bad.nonzero()[0].tolist()
        expected = "finite" if negative else "finite and at least 0"
        raise ValueError(f"{name} must be {expected}; got {value[n, g].item()} at [{n}, {g}]")


def distinct_in(dtype: torch.dtype, name: str, value: Tensor, judged: Tensor | None) -> None:  # (N, G)
    """Raise if ranks of a group that count and differ would be equal, or infinite, in the dtype of the kernels.

    What float64 arithmetic makes of equal numbers (0.1 + 0.2 and 0.3) does not differ.
    """
    rounded = value.to(dtype)
    if bool((rounded.to(value.dtype) == value).all()):
        return
    differ = value[:, :, None] != value[:, None, :]
    if value.is_floating_point():
        noise = 8 * torch.finfo(value.dtype).eps * value.abs()
        differ = (value[:, :, None] - value[:, None, :]).abs() > noise[:, :, None]
    lost = differ & (rounded[:, :, None] == rounded[:, None, :])
    lost = lost | ~rounded.isfinite()[:, :, None]
    if judged is not None:
        lost = lost & judged[:, :, None] & judged[:, None, :]
    if lost.any():
        n, i, _ = lost.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must differ in {dtype} where they differ; got {value[n, i].item()} at [{n}, {i}]"
        )


def squares_in(dtype: torch.dtype, name: str, value: Tensor, judged: Tensor | None) -> None:
    """Raise if the squares of rewards of a group that count may add up to infinity in the dtype of the kernels."""
    limit = torch.finfo(dtype).max ** 0.5 / 16
    bad = value.abs() > limit
    if judged is not None:
        bad = bad & judged
    if bad.any():
        n, g = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be within +-{limit:.2g} as rewards; got {value[n, g].item()} at [{n}, {g}]"
        )


def ids_in_range(name: str, ids: Tensor, vocabulary: int, mask: Tensor | None, validate: bool = True) -> None:
    """Raise if the id of an unmasked token is outside [0, vocabulary)."""
    if not can_read(ids, validate):
        return
    bad = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        bad = bad & mask
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} must be in [0, {vocabulary}); got {ids[tuple(at)].item()} at {at}")


def not_nan(name: str, value: Tensor, judged: Tensor | None) -> None:
    """Raise if a score that counts is NaN, which has no place in an order."""
    if not value.numel() or not value.amax().isnan():
        return
    bad = value.isnan() if judged is None else value.isnan() & judged
    if bad.any():
        raise ValueError(f"{name} must not be NaN; got NaN at {bad.nonzero()[0].tolist()}")


def finite_weights(name: str, value: Tensor | None, mask: Tensor | None) -> None:  # mask (B, T) or (M,)
    """Raise if what weighs a token that counts is NaN or infinite; it is one a token or one a response."""
    if value is None or bool(value.isfinite().all()):
        return
    bad = ~value.isfinite()
    if mask is not None and mask.shape == bad.shape:
        bad = bad & mask
    elif mask is not None and mask.dim() == 2:
        bad = bad & mask.any(1).view_as(bad)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite; got {value[tuple(at)].item()} at {at}")
