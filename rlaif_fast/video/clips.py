"""One file to one `Clip`: probe, choose frames, look in the cache, decode, resize."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlaif_fast.streams import numbered, to_device
from rlaif_fast.video.base import Clip
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.decoders import assemble, by_name, decode_sized
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.isolate import DecodeProcess
from rlaif_fast.video.preprocess import PixelBudget
from rlaif_fast.video.probe import check_same, file_digest, file_version, info_of, scan_file
from rlaif_fast.video.sampling import FrameSampling

MAX_CLIP_BYTES = 16 << 30  # frames of one clip after resizing; more is a configuration that no machine holds


def load_clip(
    path: str | Path,
    *,
    sampling: FrameSampling | None = None,
    decoder: str = "auto",
    cache: ClipCache | None = None,
    resize: PixelBudget | None = None,
    device: torch.device | str = "cpu",
    process: DecodeProcess | None = None,
    timeout: float | None = None,
) -> Clip:
    """Return the sampled frames of a video.

    Args:
        path: The file.
        sampling: Which frames; None for the defaults of `FrameSampling`.
        decoder: "auto" or a name of the decoder table.
        cache: Where frames are looked up and kept; None decodes each time.
        resize: Resize while decoding, within these limits; `preprocess` with the same limits then leaves the
            size as it is. None keeps full frames.
        device: Where the frames end up.
        process: Probe, and decode where the decoder is PyAV, in this process (see `isolate`) instead of this
            one.
        timeout: Seconds that the isolated process may take; None for no limit.

    Raises:
        VideoError: When the file is bad, with the reason.
    """
    path = str(path)
    device = numbered(torch.device(device))
    version = file_version(path)
    scan = scan_file(path, process, timeout)
    info = info_of(path, scan)
    indices, sample_fps = (sampling or FrameSampling()).sample(info)
    size = resize.size(path, len(indices), *scan.shape) if resize is not None else scan.shape
    key = clip_key(file_digest(path), indices, size)
    known = cache.get(key) if cache is not None else None
    if known is not None:
        return replace(known, frames=to_device(known.frames, device))
    wanted_bytes = len(indices) * size[0] * size[1] * 3
    if wanted_bytes > MAX_CLIP_BYTES:
        raise VideoError(
            path,
            f"{len(indices)} frames of {size[1]}x{size[0]} need {wanted_bytes / 2**30:.1f} GiB;"
            " lower max_frames or resize",
        )

    def attempt(name: str) -> Tensor:
        if process is None or name != "pyav":
            return decode_sized(path, indices, size, device, name)
        pictures = process.frames(path, scan, indices, timeout)
        return to_device(assemble(pictures, indices, scan.shape, size), device)

    frames = by_name(decoder, scan, device, attempt)
    check_same(path, version)
    times = info.timestamps
    clip = Clip(frames, tuple(times[i] for i in indices), key, path, sample_fps=sample_fps)
    if cache is not None:
        cache.put(clip)
    return clip


def clip_key(digest: str, indices: Sequence[float], size: object) -> str:
    """Return the content address of frames: the file's content, which frames (their numbers or times), how large."""
    described = f"{digest}:{','.join(map(str, indices))}:{size}"
    return hashlib.blake2b(described.encode(), digest_size=20).hexdigest()
