"""Checks of what tensors hold: each failure names the argument, what was expected and what came.

They read the data. On an accelerator the host waits for each that applies, a few in a call; they are skipped while
torch.compile traces, under torch.vmap and while a CUDA graph is captured, where the kernels still guard every read by
id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.options import check_flag

_VMAP = torch._C._functorch.TransformType.Vmap


def can_read(x: Tensor, validate: bool) -> bool:
    """Return whether values may be read: not while tracing, under vmap, nor while a CUDA graph is captured."""
    check_flag("validate", validate)
    if not validate or x.is_meta or torch.compiler.is_compiling():
        return False
    if any(level.key() == _VMAP for level in torch._C._functorch.get_interpreter_stack() or ()):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def finite_ranks(ranks: Tensor, judged: Tensor | None, *, negative: bool) -> None:
    """Raise if a rank that counts is NaN, infinite, or (unless `negative`) below 0."""
    if not ranks.numel():
        return
    low, high = ranks.aminmax()  # one pass; NaN comes through
    if low.isfinite() and high.isfinite() and (negative or low >= 0):
        return
    bad = ~ranks.isfinite() if negative else ~(ranks.isfinite() & (ranks >= 0))
    if (at := _first(bad, judged)) is not None:
        expected = "finite" if negative else "finite and at least 0"
        raise ValueError(f"oracle_ranks must be {expected}; got {ranks[tuple(at)].item()} at {at}")


def distinct_in(dtype: torch.dtype, ranks: Tensor, judged: Tensor | None) -> None:  # (N, G)
    """Raise if ranks of a group that count and differ would be equal, or infinite, in the dtype of the kernels.

    Numbers that only rounding keeps apart (0.1 + 0.2 and 0.3) count as equal.
    """
    rounded = ranks.to(dtype)
    if bool((rounded.to(ranks.dtype) == ranks).all()):
        return
    differ = ranks[:, :, None] != ranks[:, None, :]
    if ranks.is_floating_point():
        noise = 8 * torch.finfo(ranks.dtype).eps * ranks.abs()
        differ = (ranks[:, :, None] - ranks[:, None, :]).abs() > noise[:, :, None]
    lost = differ & (rounded[:, :, None] == rounded[:, None, :])
    lost = lost | ~rounded.isfinite()[:, :, None]
    pairs = None if judged is None else judged[:, :, None] & judged[:, None, :]
    if (at := _first(lost, pairs)) is not None:
        n, i, _ = at
        raise ValueError(
            f"oracle_ranks must differ in {dtype} where they differ; got {ranks[n, i].item()} at [{n}, {i}]"
        )


def squares_in(dtype: torch.dtype, rewards: Tensor, judged: Tensor | None) -> None:
    """Raise if the squares of rewards of a group that count may add up to infinity in the dtype of the kernels."""
    limit = torch.finfo(dtype).max ** 0.5 / 16
    if (at := _first(rewards.abs() > limit, judged)) is not None:
        raise ValueError(
            f"oracle_ranks must be within +-{limit:.2g} as rewards; got {rewards[tuple(at)].item()} at {at}"
        )


def ids_in_range(ids: Tensor, vocabulary: int, mask: Tensor | None, validate: bool) -> None:
    """Raise if the id of an unmasked token is outside [0, vocabulary)."""
    if not can_read(ids, validate):
        return
    if (at := _first((ids < 0) | (ids >= vocabulary), mask)) is not None:
        raise ValueError(f"token_ids must be in [0, {vocabulary}); got {ids[tuple(at)].item()} at {at}")


def scores_not_nan(scores: Tensor, judged: Tensor | None) -> None:
    """Raise if a score that counts is NaN, which has no place in an order."""
    if not scores.numel() or not scores.amax().isnan():
        return
    if (at := _first(scores.isnan(), judged)) is not None:
        raise ValueError(f"scores must not be NaN; got NaN at {at}")


def finite_weights(name: str, value: Tensor | None, mask: Tensor | None) -> None:  # mask (B, T) or (M,)
    """Raise if the weight of a token that counts is NaN or infinite; there is one per token or one per response."""
    if value is None or bool(value.isfinite().all()):
        return
    if mask is not None and mask.shape != value.shape:
        mask = mask.any(1).view_as(value) if mask.dim() == 2 else None
    if (at := _first(~value.isfinite(), mask)) is not None:
        raise ValueError(f"{name} must be finite; got {value[tuple(at)].item()} at {at}")


def _first(bad: Tensor, counts: Tensor | None) -> list[int] | None:
    """Return the index of the first entry that is bad and counts, or None; a `counts` of None counts all."""
    if counts is not None:
        bad = bad & counts
    return bad.nonzero()[0].tolist() if bad.any() else None
