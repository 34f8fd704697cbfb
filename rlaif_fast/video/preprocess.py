"""Frames to the model's patches, with the arithmetic of the Qwen-VL processors."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlaif_fast.errors import UsageError
from rlaif_fast.streams import used_here
from rlaif_fast.video.base import Clip
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.media import Media
from rlaif_fast.video.patchify import patchify_reference
from rlaif_fast.video.refs import Cut

MAX_RATIO = 200
RESIZE_CHUNK_BYTES = 64 << 20  # of full-size frames handed to the resize at a time


@dataclass(frozen=True)
class PatchSpec:
    """The patches that a vision tower takes.

    Attributes:
        patch_size: Pixels along a side of a patch (Qwen2.5-VL 14, Qwen3-VL 16).
        temporal_patch_size: Frames in a patch.
        merge_size: Patches along a side of one language-model token.
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
        tokens_a_frame: Features of a frame where the tower takes whole frames of one size, which is then
            `patch_size`; None where it takes patches.
        kept: Which features of a video its prompt holds: "all", "changed" (those that differ from the same place in the
            frame before), or None where the model drops none.
    """

    patch_size: int
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    tokens_a_frame: int | None = None
    kept: Literal["all", "changed"] | None = None

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def factor(self) -> int:
        """Height and width of a preprocessed frame are multiples of this."""
        return self.patch_size * self.merge_size

    def tokens(self, media: Media) -> int:
        """Language-model tokens of a medium, before any are dropped."""
        t, h, w = media.grid_thw
        return t * (h * w // self.merge_size**2 if self.tokens_a_frame is None else self.tokens_a_frame)

    def budget(self, min_pixels: int, max_pixels: int, total_pixels: int | None = None) -> PixelBudget:
        """How large this tower's frames may be."""
        fixed = self.tokens_a_frame is not None
        return PixelBudget(self.factor, min_pixels, max_pixels, total_pixels, self.temporal_patch_size, fixed)


@dataclass(frozen=True)
class PixelBudget:
    """How large frames may be after resizing.

    Attributes:
        factor: Height and width become multiples of this (`PatchSpec.factor`).
        min_pixels: Fewest pixels of a frame.
        max_pixels: Most pixels of a frame.
        total_pixels: Most pixels of a video, counted per temporal patch of `frame_factor` frames; None for no
            limit.
        frame_factor: Frames in a temporal patch.
        fixed: Whether every frame becomes `factor` x `factor` whatever the other limits are.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    total_pixels: int | None = None
    frame_factor: int = 2
    fixed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UsageError(
                f"expected 1 <= min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )

    def cut(self, cut: Cut) -> PixelBudget:
        """This budget with what a row or a message part says of its own medium."""
        own: dict[str, Any] = {key: value for key, value in cut.given().items() if key.endswith("_pixels")}
        if "max_pixels" in own:
            own.setdefault("min_pixels", min(self.min_pixels, own["max_pixels"]))
        if "min_pixels" in own:
            own.setdefault("max_pixels", max(self.max_pixels, own["min_pixels"]))
        return replace(self, **own)

    def size(self, path: str, frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that `frames` frames of a video are resized to."""
        if self.fixed:
            return self.factor, self.factor
        most: float = self.max_pixels
        if self.total_pixels is not None:
            share = max(self.total_pixels / frames * self.frame_factor, int(self.min_pixels * 1.05))
            most = min(most, share)
        if max(height, width) > MAX_RATIO * min(height, width):
            raise VideoError(path, f"{width}x{height} is more than {MAX_RATIO} times as long as wide")
        return smart_resize(height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=most)


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: float
) -> tuple[int, int]:
    """Return the size that keeps the aspect ratio best, in multiples of `factor`, within the pixel limits.

    Args:
        height: Pixels.
        width: Pixels.
        factor: Both results are multiples of this.
        min_pixels: Least height * width of the result.
        max_pixels: Most height * width of the result (a side never falls under `factor`).

    Returns:
        (height, width).

    Raises:
        ValueError: For an aspect ratio above 200 or limits that exclude each other.

    Source: qwen-vl-utils 0.0.14, `smart_resize`.
    """
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels must not exceed max_pixels, got {min_pixels} and {max_pixels}")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"the aspect ratio must be at most {MAX_RATIO}, got {height}x{width}")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_frames(
    frames: Tensor,  # (F, H, W, 3) uint8
    size: tuple[int, int],
) -> Tensor:
    """Return `frames` resized to (height, width): antialiased bicubic, rounded, as torchvision does."""
    if tuple(frames.shape[1:3]) == tuple(size):
        return frames
    out = frames.new_empty(frames.shape[0], *size, 3)
    step = max(1, RESIZE_CHUNK_BYTES // max(1, frames[0].numel()))
    for at in range(0, frames.shape[0], step):
        chunk = frames[at : at + step].permute(0, 3, 1, 2)  # (f, 3, H, W), channels last in memory
        if frames.device.type == "cpu":
            resized = F.interpolate(chunk, size=size, mode="bicubic", antialias=True, align_corners=False)
        else:  # uint8 interpolation is a CPU kernel; elsewhere round as it does
            resized = F.interpolate(
                chunk.float(), size=size, mode="bicubic", antialias=True, align_corners=False
            )
            resized = resized.round_().clamp_(0, 255)
        out[at : at + step] = resized.permute(0, 2, 3, 1)
    return out


def preprocess(
    clip: Clip,
    spec: PatchSpec,
    *,
    min_pixels: int,
    max_pixels: int,
    total_pixels: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Media:
    """Return the patches of a clip: resized within the pixel limits, normalised, in the model's row order.

    Args:
        clip: The frames.
        spec: Patch sizes and normalisation of the model.
        min_pixels: Fewest pixels of a resized frame.
        max_pixels: Most pixels of a resized frame.
        total_pixels: Most pixels of a whole video, per temporal patch; None for no limit. Images ignore it.
        device: Where the work is done and the patches stay; None for where the frames are.
        dtype: Of the patches.
        backend: Of `patchify`.

    Returns:
        `Media` with patches (n, 3 * temporal_patch_size * patch_size**2).

    Raises:
        VideoError: When the frames are more than 200 times as long as wide.
    """
    frames = used_here(clip.frames if device is None else clip.frames.to(device))
    count, height, width, _ = frames.shape
    budget = spec.budget(min_pixels, max_pixels, None if clip.is_image else total_pixels)
    size = budget.size(clip.path, count, height, width)
    patches = patchify(resize_frames(frames, size), spec, dtype, backend)
    grid = (-(-count // spec.temporal_patch_size), size[0] // spec.patch_size, size[1] // spec.patch_size)
    described = f"{clip.key}:{spec}:{size}:{dtype}"
    return Media(
        patches=patches,
        grid_thw=grid,
        is_video=not clip.is_image,
        seconds_per_grid=spec.temporal_patch_size / clip.sample_fps if clip.sample_fps else 0.0,
        key=hashlib.blake2b(described.encode(), digest_size=20).hexdigest(),
        timestamps=() if clip.is_image else grid_timestamps(clip.timestamps, spec.temporal_patch_size),
        kept=None if spec.kept is None else kept_features(patches, grid, spec),
    )


CHANGED = 0.1  # mean distance of normalised patches, times 255, above which a place has changed


def kept_features(patches: Tensor, grid: tuple[int, int, int], spec: PatchSpec) -> Tensor:
    """Return which features stay, (t * h * w / merge**2,) bool: VideoLLaMA3's token compression.

    The first frame stays whole; of the others the places that changed, and at least the first place.
    """
    t, h, w = grid
    places = patches.view(t, h * w // spec.merge_size**2, -1)
    if spec.kept == "all" or t == 1:
        return torch.ones(places.shape[:2], dtype=torch.bool, device=patches.device).flatten()
    kept = torch.ones(places.shape[:2], dtype=torch.bool, device=patches.device)
    kept[1:] = (places[1:] - places[:-1]).abs().mean(-1) * 255 > CHANGED
    kept[:, 0] |= ~kept.any(1)
    return kept.flatten()


def grid_timestamps(timestamps: tuple[float, ...], temporal_patch_size: int) -> tuple[float, ...]:
    """Return the time of each temporal patch, midway between its first and last frame."""
    full = timestamps + timestamps[-1:] * (-len(timestamps) % temporal_patch_size)
    starts = range(0, len(full), temporal_patch_size)
    return tuple((full[i] + full[i + temporal_patch_size - 1]) / 2 for i in starts)


def patchify(
    frames: Tensor,  # (F, H, W, 3) uint8
    spec: PatchSpec,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Return the normalised patches (n, 3 * temporal_patch_size * patch_size**2) of resized frames.

    Args:
        frames: (F, H, W, 3) uint8; H and W are multiples of `spec.factor`.
        spec: Patch sizes and normalisation.
        dtype: Of the patches.
        backend: "auto", "triton" (on a GPU), "torch" or "reference".

    Raises:
        ValueError: For another backend, or one that cannot run here.
    """
    reasons = {name: refuses(frames.device.type, dtype) for name, (refuses, _) in PATCHIFIERS.items()}
    if backend == "auto":  # Triton's interpreter, which reaches the CPU, is for tests
        backend = "triton" if frames.is_cuda and reasons["triton"] is None else "torch"
    if backend not in reasons:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(PATCHIFIERS)}, got {backend!r}")
    if reasons[backend] is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reasons[backend]}")
    return PATCHIFIERS[backend][1](
        frames,
        patch_size=spec.patch_size,
        temporal_patch_size=spec.temporal_patch_size,
        merge_size=spec.merge_size,
        mean=spec.mean,
        std=spec.std,
        dtype=dtype,
    )


def _refuses_triton(device_type: str, dtype: torch.dtype) -> str | None:
    # Looked at first: importing Triton takes seconds.
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "the frames are on cpu; Triton runs on cuda"
    try:
        from rlaif_fast_kernels import launch, patchify
    except ImportError as error:
        return f"{error.name} is not installed"
    return launch.unavailable() or patchify.supports(device_type, dtype)


def _patchify_triton(frames: Tensor, **options: Any) -> Tensor:
    from rlaif_fast_kernels.patchify import patchify

    return patchify(frames, **options)


def _patchify_torch(
    frames: Tensor,  # (F, H, W, 3) uint8
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """One temporal patch at a time through scratch that stays in the cache.

    The strided copy moves bytes, not floats, and the only fresh memory is the result: on a CPU the first
    touch of a page costs more than the arithmetic.
    """
    p, pt, m = patch_size, temporal_patch_size, merge_size
    count, height, width, channels = frames.shape
    down, across, steps = height // (m * p), width // (m * p), -(-count // pt)
    rows = down * across * m * m
    patches = frames.new_empty(steps * rows, channels, pt * p * p, dtype=dtype)
    ordered = frames.new_empty(down, across, m, m, channels, pt, p, p)
    floats = frames.new_empty(rows, channels, pt * p * p, dtype=torch.float32)
    scale = torch.tensor([1 / (255 * s) for s in std], device=frames.device).view(channels, 1)
    shift = torch.tensor([-a / s for a, s in zip(mean, std, strict=True)], device=frames.device).view(
        channels, 1
    )
    for step in range(steps):
        group = frames[step * pt : (step + 1) * pt]
        if len(group) < pt:
            group = torch.cat([group, group[-1:].expand(pt - len(group), -1, -1, -1)])
        grid = group.reshape(pt, down, m, p, across, m, p, channels)
        ordered.copy_(grid.permute(1, 4, 2, 5, 7, 0, 3, 6))
        out = patches[step * rows : (step + 1) * rows]
        values = out if dtype == torch.float32 else floats
        values.copy_(ordered.view(rows, channels, -1))
        values.mul_(scale).add_(shift)
        if values is not out:
            out.copy_(values)
    return patches.view(-1, channels * pt * p * p)


# Name -> (why it cannot run for a device type and dtype, or None; the function), the preferred one first.
PATCHIFIERS: dict[str, tuple[Callable[[str, torch.dtype], str | None], Callable[..., Tensor]]] = {
    "triton": (_refuses_triton, _patchify_triton),
    "torch": (lambda _device, _dtype: None, _patchify_torch),
    "reference": (lambda _device, _dtype: None, patchify_reference),
}
