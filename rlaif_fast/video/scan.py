"""What the packet headers of a video file say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# Why a decoder that counts frames by itself refuses a file that is not `Scan.plain`.
NOT_PLAIN = (
    "its frames or their numbers would differ (hidden, cut or unordered, several videos or several sizes)"
)


@dataclass(frozen=True)
class Scan:
    """What the packets of a file's video stream say; of several streams, the one that players show.

    Attributes:
        codec: Codec name as FFmpeg spells it.
        width: Pixels, as coded (before rotation).
        height: Pixels, as coded (before rotation).
        pixel_format: As FFmpeg spells it.
        colorspace: Number of the matrix between RGB and YUV (ITU-T H.273, table 4); 2 where the file names none.
        rotation: Degrees clockwise to turn a decoded frame for display; 0, 90, 180 or 270.
        mirrored: Whether a decoded frame is turned upside down before that.
        fps: Average frames per second.
        duration: Seconds.
        pts: Presentation time of each shown frame, ascending, in units of `time_base`.
        order: Decode order of each shown frame (its packet's number).
        keys: Presentation times of the key frames, ascending.
        key_order: Decode order of each key frame.
        time_base: Seconds per unit.
        variable_rate: Whether the frames are unevenly spaced.
        counted: Whether frames can only be told apart by counting (no usable presentation times).
        plain: Whether the file has one video stream, each packet is one shown frame, and all frames have one size, so
            that every decoder numbers and sizes frames alike.
    """

    codec: str
    width: int
    height: int
    pixel_format: str
    colorspace: int
    rotation: int
    mirrored: bool
    fps: float
    duration: float
    pts: tuple[int, ...]
    order: tuple[int, ...]
    keys: tuple[int, ...]
    key_order: tuple[int, ...]
    time_base: Fraction
    variable_rate: bool
    counted: bool
    plain: bool

    @property
    def timestamps(self) -> tuple[float, ...]:
        """Seconds since the first shown frame."""
        return seconds_since_first(self.pts, self.time_base)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of an upright frame."""
        return (self.width, self.height) if self.rotation in (90, 270) else (self.height, self.width)


def seconds_since_first(pts: Sequence[int], base: Fraction) -> tuple[float, ...]:
    """Times in units of `base` seconds as seconds since the first, rounded once each.

    Gives the same floats as `Fraction` in a twentieth of the time: an hour has a hundred thousand frames.
    """
    first, numerator, denominator = pts[0], base.numerator, base.denominator
    return tuple((p - first) * numerator / denominator for p in pts)
