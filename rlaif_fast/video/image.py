"""One picture to one `Clip` of one frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlaif_fast.video.base import Clip
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.clips import clip_key
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.preprocess import PixelBudget, resize_frames
from rlaif_fast.video.probe import file_digest

MAX_IMAGE_PIXELS = 200_000_000
# Raster kinds alone: others run programs (EPS runs Ghostscript) or name other files.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def load_image(
    path: str | Path, *, resize: PixelBudget | None = None, cache: ClipCache | None = None
) -> Clip:
    """Return a still image as a clip of one frame, upright (EXIF), transparent parts on white.

    Raises:
        VideoError: When the file is not an image, or not a whole one.
    """
    path = str(path)
    key = clip_key(file_digest(path), [0], None if resize is None else f"image:{resize}")
    known = cache.get(key) if cache is not None else None
    if known is not None:
        return known
    picture = _read(path)
    data = bytearray(picture.tobytes())
    frames = torch.frombuffer(data, dtype=torch.uint8).view(1, picture.height, picture.width, 3)
    if resize is not None:
        frames = resize_frames(frames, resize.size(path, 1, picture.height, picture.width))
    clip = Clip(frames, (0.0,), key, path, is_image=True)
    if cache is not None:
        cache.put(clip)
    return clip


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
