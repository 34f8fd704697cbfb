"""Writes frames as a video file, the same bytes for the same frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

CODECS = {
    "vp9": (
        "libvpx-vp9",
        {"deadline": "realtime", "cpu-used": "8", "row-mt": "0", "lag-in-frames": "0", "crf": "24", "b": "0"},
    ),
    "h264": ("libx264", {"preset": "veryfast", "crf": "20", "bf": "0"}),
}
CONTAINERS = ("mp4", "webm")


def encode_video(
    path: str | Path,
    frames: NDArray[np.uint8],  # (F, H, W, 3)
    *,
    fps: float = 6.0,
    codec: str = "vp9",
) -> None:
    """Encode RGB frames into a file.

    Args:
        path: Ends in .mp4, or .webm for VP9.
        frames: (F, H, W, 3) uint8 RGB; height and width even.
        fps: Frames per second.
        codec: "vp9" or "h264".

    Raises:
        ValueError: The frames, the codec or the container cannot be used.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames: expected (F, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f"frames: expected an even height and width, got {frames.shape[1]}x{frames.shape[2]}"
        )
    if codec not in CODECS:
        raise ValueError(f"codec: expected one of {sorted(CODECS)}, got {codec!r}")
    suffix = Path(path).suffix[1:]
    if suffix not in CONTAINERS or (codec == "h264" and suffix == "webm"):
        raise ValueError(f"path: {codec} does not go into a .{suffix} file; use .mp4")
    encoder, options = CODECS[codec]
    rate = Fraction(fps).limit_denominator(1001)
    # bitexact: no dates, random identifiers or library versions in the file
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = cast(
            Any, container.add_stream(encoder, rate=rate, options={**options, "flags": "+bitexact"})
        )
        stream.height, stream.width = frames.shape[1], frames.shape[2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = len(frames)
        stream.codec_context.thread_count = 1
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
