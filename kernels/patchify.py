"""Normalised patches of uint8 frames in the row order of the Qwen-VL processors, in one pass.

    patches[row, column] = frames[f, y, x, c] * scale[c] + shift[c]
    scale = 1 / (255 std),  shift = -mean / std

    row     = (t, y / (M P), x / (M P), my, mx): the M * M patches of one language-model token are adjacent
    column  = (c, frame within the patch, y within the patch, x within the patch)

Float32 inside, cast at the store; no gradient. Float frames, planes and a permuted copy are never made: each
byte is read once and each value written once, 1 + sizeof(dtype) bytes a value. A program does BLOCK_L lines
of one token, a line being the P values of one image row of one patch: lines are contiguous in the output, so
stores are whole, and a token's pixels are read by one program, so that the three passes over its interleaved
colours meet in the cache. Frames missing from the last temporal patch repeat the last one.

Letters: F frames, H, W their size, C = 3 colours, P patch size, T frames in a patch, M patches along a side
of a token, D = C T P P values of a patch, PP = P rounded up to a power of two. Suffixes: _l line, _x column
in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast_kernels.launch import AotConfig, refuse

CHANNELS = 3


def launch_config(P: int) -> dict[str, int]:
    """2,048 values a program: 16 a thread."""
    PP = triton.next_power_of_2(P)
    return {"PP": PP, "BLOCK_L": max(1, 2048 // PP), "num_warps": 4, "num_stages": 1}


@triton.jit
def patchify_kernel(
    frames,  # (F, H, W, 3) uint8
    patches,  # (tokens * M * M, D) out
    last_frame,  # F - 1
    tokens_down,  # H / (M P)
    tokens_across,  # W / (M P)
    stride_f,
    stride_h,
    stride_w,
    stride_c,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    P: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    PP: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    LINES: tl.constexpr = M * M * 3 * T * P
    token = tl.program_id(0)
    token_x = token % tokens_across
    token_y = token // tokens_across % tokens_down
    token_t = token // (tokens_across * tokens_down)

    offs_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    y = offs_l % P
    step = offs_l // P % T
    c = offs_l // (P * T) % 3
    patch = offs_l // (P * T * 3)
    frame = tl.minimum(token_t * T + step, last_frame).to(tl.int64)
    row = ((token_y * M + patch // M) * P + y).to(tl.int64)
    column = ((token_x * M + patch % M) * P).to(tl.int64)
    start_l = frame * stride_f + row * stride_h + column * stride_w + c * stride_c

    offs_x = tl.arange(0, PP)
    live = (offs_l < LINES)[:, None] & (offs_x < P)[None, :]
    pixel = tl.load(frames + start_l[:, None] + (offs_x * stride_w)[None, :], mask=live, other=0)
    scale = tl.where(c == 0, scale_r, tl.where(c == 1, scale_g, scale_b))
    shift = tl.where(c == 0, shift_r, tl.where(c == 1, shift_g, shift_b))
    value = pixel.to(tl.float32) * scale[:, None] + shift[:, None]

    # Flat from here on. With one shape for both, the load would get the layout of the wide store, in which each
    # thread reads a run of bytes; this way neighbouring threads read neighbouring bytes and exchange them in
    # shared memory.
    value = tl.reshape(value.to(patches.dtype.element_ty), (BLOCK_L * PP,))
    offs = tl.arange(0, BLOCK_L * PP)
    line = tl.program_id(1) * BLOCK_L + offs // PP
    out = patches + token.to(tl.int64) * (LINES * P)
    tl.store(out + line * P + offs % PP, value, mask=(line < LINES) & (offs % PP < P))


def patchify(
    frames: Tensor,  # (F, H, W, 3) uint8, any strides
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return what `rlaif_fast.video.patchify.patchify_reference` does, in one launch."""
    P, T, M = patch_size, temporal_patch_size, merge_size
    F, H, W, C = frames.shape
    if frames.dtype != torch.uint8 or C != CHANNELS:
        raise TypeError(f"frames must be (F, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}")
    if H % (M * P) or W % (M * P):
        raise ValueError(f"height and width must be multiples of {M * P}, got {H} and {W}")
    steps, down, across = -(-F // T), H // (M * P), W // (M * P)
    patches = frames.new_empty(steps * down * across * M * M, C * T * P * P, dtype=dtype)
    config = launch_config(P)
    if patches.numel():
        with torch.cuda.device_of(frames):
            patchify_kernel[(steps * down * across, triton.cdiv(M * M * C * T * P, config["BLOCK_L"]))](
                frames,
                patches,
                F - 1,
                down,
                across,
                *frames.stride(),
                *(1 / (255 * s) for s in std),
                *(-m / s for m, s in zip(mean, std, strict=True)),
                P=P,
                T=T,
                M=M,
                **config,
            )
    return patches


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot write patches of such a dtype there, or None."""
    return refuse("patches", device_type, dtype)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles."""
    numbers = dict.fromkeys(("last_frame", "tokens_down", "tokens_across"), "i32")
    strides = {"stride_f": "i32", "stride_h": "i32", "stride_w": "i32"}
    colours = dict.fromkeys((f"{what}_{c}" for what in ("scale", "shift") for c in "rgb"), "fp32")
    configs = []
    for P, T, M in ((14, 2, 2), (16, 2, 2)):
        config = launch_config(P)
        constexprs = {"P": P, "T": T, "M": M, "PP": config["PP"], "BLOCK_L": config["BLOCK_L"], "stride_c": 1}
        for kind in ("bf16", "fp32"):
            types = {"frames": "*u8:16", "patches": f"*{kind}:16"} | numbers | strides | colours
            configs.append(
                AotConfig(
                    patchify_kernel,
                    types,
                    constexprs,
                    config["num_warps"],
                    config["num_stages"],
                    f"P={P}, {kind}",
                )
            )
    return configs
