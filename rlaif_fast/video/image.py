"""One picture to one `Clip` of one frame, and many to a `Clip` of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlaif_fast.video.base import Clip, VideoInfo
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.clips import clip_key
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.preprocess import PixelBudget, resize_frames
from rlaif_fast.video.probe import check_same, file_digest, file_version
from rlaif_fast.video.sampling import FrameSampling

MAX_IMAGE_PIXELS = 200_000_000
# Raster kinds alone: others run programs (EPS runs Ghostscript) or name other files.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(
    path: str | Path, *, resize: PixelBudget | None = None, cache: ClipCache | None = None
) -> Clip:
    """Return a still image as a clip of one frame, upright (EXIF), transparent parts on white, 16 bits as 8.

    Args:
        path: The file.
        resize: Limits on its size, but for `total_pixels`, which is of videos; None keeps all pixels.
        cache: Where it is looked up and kept.

    Raises:
        VideoError: When the file is not an image, or not a whole one.
    """
    path = str(path)
    resize = None if resize is None else replace(resize, total_pixels=None)
    version = file_version(path)
    key = clip_key(file_digest(path), [0], None if resize is None else f"image:{resize}")
    known = cache.get(key) if cache is not None else None
    if known is not None:
        return known
    picture = _read(path)
    check_same(path, version)
    data = bytearray(picture.tobytes())
    frames = torch.frombuffer(data, dtype=torch.uint8).view(1, picture.height, picture.width, 3)
    if resize is not None:
        frames = resize_frames(frames, resize.size(path, 1, picture.height, picture.width))
    clip = Clip(frames, (0.0,), key, path, is_image=True)
    if cache is not None:
        cache.put(clip)
    return clip


def load_frames(
    path: str,
    frames: Sequence[str],
    *,
    sampling: FrameSampling,
    resize: PixelBudget | None = None,
    cache: ClipCache | None = None,
) -> Clip:
    """Return the clip of a video that comes as pictures.

    All of them are seen, up to `sampling.max_frames`, evenly spread where there are more, or where `nframes` says so.
    `sampling.fps` is the rate they were taken at.

    Args:
        path: What the video is called.
        frames: The pictures, in order.
        sampling: Which of them, and their rate.
        resize: Limits on the size of a frame.
        cache: Where frames are looked up and kept.

    Raises:
        VideoError: A picture is bad or of another size than the first, or they are too few.
    """
    rate = sampling.fps
    times = tuple(i / rate for i in range(len(frames)))
    info = VideoInfo(path, "pictures", 0, 0, len(frames), rate, len(frames) / rate, times)
    whole = sampling.nframes is None and len(frames) <= sampling.max_frames
    # An incomplete last temporal patch is filled up where the patches are made.
    factor = 1 if whole else sampling.frame_factor
    chosen = replace(sampling, min_frames=sampling.max_frames, frame_factor=factor)
    indices, sample_fps = chosen.sample(info)
    budget = "" if resize is None else str(resize)
    versions = [(frames[i], file_version(frames[i])) for i in indices]
    key = clip_key(",".join(file_digest(frames[i]) for i in indices), indices, f"pictures:{rate}:{budget}")
    known = cache.get(key) if cache is not None else None
    if known is not None:
        return known
    pictures = [load_image(frames[i]).frames for i in indices]
    for picture_path, version in versions:
        check_same(picture_path, version)
    for i, picture in zip(indices, pictures):
        if picture.shape != pictures[0].shape:
            raise VideoError(
                frames[i], f"{_size(picture)}, but the first picture of this video is {_size(pictures[0])}"
            )
    stacked = torch.cat(pictures)
    if resize is not None:
        stacked = resize_frames(stacked, resize.size(path, len(indices), *stacked.shape[1:3]))
    clip = Clip(stacked, tuple(times[i] for i in indices), key, path, sample_fps=sample_fps)
    if cache is not None:
        cache.put(clip)
    return clip


def _size(frames: torch.Tensor) -> str:
    return f"{frames.shape[2]}x{frames.shape[1]}"


def _read(path: str) -> Any:
    """The picture as RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with Image.open(path, formats=formats) as opened:
            if opened.width * opened.height > MAX_IMAGE_PIXELS:
                raise VideoError(path, f"{opened.width}x{opened.height} is too large for an image")
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16") or (picture.mode == "I" and opened.format in ("PNG", "PPM")):
                values = (np.asarray(picture).astype(np.uint32) + 128) // 257  # 65535 becomes 255
                picture = Image.fromarray(values.astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise VideoError(path, "holds values of 32 bits, whose range nothing says; save 8 or 16 bits")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
                picture = Image.alpha_composite(white, picture)
            return picture.convert("RGB")
    except VideoError:
        raise
    except FileNotFoundError:
        raise VideoError(path, "does not exist") from None
    except UnidentifiedImageError:
        raise VideoError(path, f"not an image of a kind that is read ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise VideoError(path, "is too large for an image") from None
    except Exception as error:  # whatever a decoder raises is the file's fault
        raise VideoError(path, f"damaged image: {type(error).__name__}: {error}") from None
