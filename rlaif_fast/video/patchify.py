"""Normalised patches of uint8 frames, in the row order of Hugging Face's Qwen-VL processors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patchify_reference(
    frames: Tensor,  # (F, H, W, 3) uint8
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return patches (n, 3 * temporal_patch_size * patch_size**2) of `frames`.

    A row is one patch, its columns ordered (channel, frame, y, x). Rows are ordered (t, h / m, w / m, m, m):
    the m * m patches that the model merges into one token are adjacent. The value is (x / 255 - mean) / std.
    Frames that do not fill the last temporal patch are completed with the last one, as the processors do.

    Args:
        frames: (F, H, W, 3) uint8; H and W are multiples of patch_size * merge_size.
        patch_size: Pixels along a side of a patch.
        temporal_patch_size: Frames in a patch.
        merge_size: Patches along a side of a token.
        mean: Per channel, in units of full scale.
        std: Per channel, in units of full scale.
        dtype: Of the result; float64 is computed in float64, everything else in float32.
    """
    p, pt, m = patch_size, temporal_patch_size, merge_size
    missing = -frames.shape[0] % pt
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    count, height, width, channels = frames.shape
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=inside, device=frames.device)
    shift = torch.tensor([-a / s for a, s in zip(mean, std, strict=True)], dtype=inside, device=frames.device)
    values = frames.to(inside) * scale + shift
    grid = values.view(count // pt, pt, height // (m * p), m, p, width // (m * p), m, p, channels)
    rows = grid.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, h/m, w/m, m, m, channel, frame, y, x
    return rows.reshape(-1, channels * pt * p * p).to(dtype)
