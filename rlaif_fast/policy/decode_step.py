"""The work between the matmuls of a decode step: the references, and whether the Triton kernels can run.

Each rounds at the same points as the modules of Transformers' Llama, Qwen2 and Qwen3.

Letters: S tokens, C hidden size, H heads, D head size, M elements of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of `x` over its last dimension, in its dtype; the mean square is taken in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_reference(
    residual: Tensor,  # (S, C)
    delta: Tensor | None,  # (S, C)
    weight: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the norm of `residual + delta`, and the sum; each (S, C)."""
    total = residual if delta is None else residual + delta
    return rms_norm_reference(total, weight, eps), total


def rotate_reference(
    heads: Tensor,  # (S, H, D)
    cos: Tensor,  # (S, D)
    sin: Tensor,  # (S, D)
    norm: Tensor | None,  # (D,)
    eps: float,
) -> Tensor:
    """Return the heads, normed if `norm` is given, then rotated to the positions of `cos` and `sin`."""
    heads = heads if norm is None else rms_norm_reference(heads, norm, eps)
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def silu_mul_reference(
    gate: Tensor,  # (S, M)
    up: Tensor,  # (S, M)
) -> Tensor:
    """Return silu(gate) * up (S, M)."""
    return torch.nn.functional.silu(gate) * up


def refuses_decode_step(device_type: str, dtype: torch.dtype, hidden_size: int, head_size: int) -> str | None:
    """Return why the Triton kernels cannot run there, or None."""
    try:
        from rlaif_fast_kernels import decode_step, launch
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return launch.unavailable() or decode_step.supports(device_type, dtype, hidden_size, head_size)
