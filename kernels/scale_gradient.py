"""A gradient times the upstream scale, in place. The device checks whether the scale is 1, in which case nothing is
read or written: the host does not wait for it.

    x <- x * scale        in float32, rounded once

Letters: M elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast_kernels.launch import AotConfig

__all__ = ["aot_configs", "scale_gradient_"]

BLOCK = 8192
NUM_WARPS = 8


@triton.jit
def scale_gradient_kernel(
    x,  # (M,) in and out
    scale,  # scalar
    M,
    BLOCK: tl.constexpr,
):
    by = tl.load(scale).to(tl.float32)
    if by != 1.0:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + offs, mask=offs < M, other=0.0).to(tl.float32)
        tl.store(x + offs, value * by, mask=offs < M)


def scale_gradient_(
    x: Tensor,  # contiguous
    scale: Tensor,  # scalar
) -> Tensor:
    """Multiply x by scale, in place, and return it."""
    assert x.is_contiguous() and scale.numel() == 1
    if x.numel():
        with torch.cuda.device_of(x):
            scale_gradient_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, scale, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return x


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles."""
    types = {"x": "*bf16:16", "scale": "*fp32:16", "M": "i64"}
    return [AotConfig(scale_gradient_kernel, types, {"BLOCK": BLOCK}, NUM_WARPS, 1, "bf16")]
