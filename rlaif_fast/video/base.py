"""What a decoded clip is, and the decoder protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class VideoInfo:
    """What a container says about its video stream, checked against its packets.

    Attributes:
        path: The file.
        codec: Codec name as FFmpeg spells it, e.g. "vp9".
        width: Pixels, before rotation.
        height: Pixels, before rotation.
        frames: Number of decodable frames.
        fps: Average frames per second.
        duration: Seconds.
        timestamps: Presentation time of each frame in seconds, ascending, starting at or after 0.
        rotation: Degrees clockwise to turn a decoded frame for display; 0, 90, 180 or 270.
        pixel_format: Pixel format name as FFmpeg spells it, e.g. "yuv420p".
        variable_rate: Whether the frames are unevenly spaced in time.
    """

    path: str
    codec: str
    width: int
    height: int
    frames: int
    fps: float
    duration: float
    timestamps: tuple[float, ...]
    rotation: int = 0
    pixel_format: str = ""
    variable_rate: bool = False


@dataclass(frozen=True)
class Clip:
    """The sampled frames of one video (or one image, F = 1).

    Attributes:
        frames: (F, H, W, 3) uint8 RGB.
        timestamps: Presentation time of each frame in seconds.
        key: Content address of the frames (file identity, indices, size), the same for equal clips.
        path: Where it came from.
        is_image: Whether the source is a still image.
        sample_fps: Sampled frames per second of video; 0 for an image.
    """

    frames: Tensor  # (F, H, W, 3) uint8
    timestamps: tuple[float, ...]
    key: str
    path: str = ""
    is_image: bool = False
    sample_fps: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the part of the video is that its frames were sampled from; 0 for an image."""
        return round(len(self.frames) / self.sample_fps, 6) if self.sample_fps else 0.0


@runtime_checkable
class VideoDecoder(Protocol):
    """Decodes chosen frames of one file. Raises `VideoError` with the reason when the file is bad."""

    name: str

    def decode(self, path: str, indices: Sequence[int]) -> Tensor:
        """Return frames (F, H, W, 3) uint8 RGB, upright, in the order of `indices` (repeats allowed)."""
        ...
