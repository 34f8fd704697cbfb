"""Videos with a frame counter drawn in the picture, for tests and benchmarks of this package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 10


def counter_frame(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Return (height, width, 3) uint8: the bits of `number` as bars in the top half, a colour below."""
    picture = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        picture[: height // 2, left:right] = 235 if number >> bit & 1 else 20
    x = np.arange(width)[None, :]
    y = np.arange(height - height // 2)[:, None]
    low = picture[height // 2 :]
    low[..., 0] = (x * 255 // width + 0 * y).astype(np.uint8)
    low[..., 1] = (y * 255 // max(1, height) + 0 * x).astype(np.uint8)
    low[..., 2] = (number * 5) % 256
    return picture


def read_counter(picture: Any) -> int:
    """Return the number that `counter_frame` drew; `picture` is (height, width, 3), an array or a tensor."""
    top = np.asarray(picture)[: len(picture) // 2].mean(axis=(0, 2))
    width = len(top)
    number = 0
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        margin = (right - left) // 4
        number |= int(top[left + margin : right - margin].mean() > 127) << bit
    return number


def counter_frames(count: int, height: int = 96, width: int = 128) -> Iterator[np.ndarray]:
    """Yield `count` counter frames."""
    for number in range(count):
        yield counter_frame(number, height, width)


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    codec: str = "libvpx-vp9",
    fps: int | Fraction = 30,
    gop: int = 12,
    pixel_format: str = "yuv420p",
    times: Iterable[int] | None = None,
    codec_options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Encode `frames` (H, W, 3) uint8 and return `path`.

    Args:
        path: Written to; the ending names the container unless `format` does.
        frames: Pictures of one size.
        codec: FFmpeg's name of the encoder.
        fps: Frames per second.
        gop: Most frames from one key frame to the next.
        pixel_format: As FFmpeg spells it.
        times: Presentation time of each frame in milliseconds; None for even spacing.
        codec_options: For the encoder.
        container_options: For the muxer.
        format: Container format.
    """
    fast = {
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
        "libx264": {"preset": "ultrafast", "bf": "2"},
    }
    moments = iter(times) if times is not None else None
    with av.open(str(path), "w", format=format, options=dict(container_options or {})) as container:
        stream: Any = None
        for number, picture in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=fps)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pixel_format
                stream.gop_size = gop
                stream.options = {**fast.get(codec, {}), **(codec_options or {})}
                if moments is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if moments is not None:
                frame.pts, frame.time_base = next(moments), Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = number, 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)
