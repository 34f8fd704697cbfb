"""Which frames of a video the model sees: the arithmetic of qwen-vl-utils, but true times where uneven."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlaif_fast.video.base import VideoInfo
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.refs import MediaRef

_OF_ROWS = ("video_start", "video_end", "fps", "nframes", "min_frames", "max_frames")


@dataclass(frozen=True)
class FrameSampling:
    """How frames are chosen.

    Attributes:
        fps: Frames per second of video; ignored when `nframes` is given.
        nframes: This many frames, rounded to a multiple of `frame_factor`.
        min_frames: Fewest frames under `fps`.
        max_frames: Most frames under `fps`.
        frame_factor: The number of frames is a multiple of this (the model's temporal patch).
        video_start: Seconds; earlier frames are left out.
        video_end: Seconds; later frames are left out.
    """

    fps: float = 2.0
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    frame_factor: int = 2
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        if not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps must be positive and finite, got {self.fps}")
        for name in ("video_start", "video_end"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 <= seconds < math.inf:
                raise ValueError(f"{name} must be a finite number of seconds, at least 0, got {seconds}")
        if self.frame_factor < 1:
            raise ValueError(f"frame_factor must be at least 1, got {self.frame_factor}")
        if self.nframes is not None and self.nframes < 1:
            raise ValueError(f"nframes must be at least 1, got {self.nframes}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"expected 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}"
            )

    def cut(self, medium: MediaRef) -> FrameSampling:
        """This sampling with what a row or a message part says of its own video."""
        own: dict[str, Any] = {key: value for key, value in medium.cut.given().items() if key in _OF_ROWS}
        # Of pictures `fps` is the rate that they were taken at, and says nothing of how many are seen.
        if ("fps" in own and not medium.frames) or "min_frames" in own or "max_frames" in own:
            # the row's own rate takes precedence over a count in the configuration
            own.setdefault("nframes", None)
        if "max_frames" in own:
            own.setdefault("min_frames", min(self.min_frames, own["max_frames"]))
        if "min_frames" in own:
            own.setdefault("max_frames", max(self.max_frames, own["min_frames"]))
        return replace(self, **own)

    def sample(self, info: VideoInfo) -> tuple[list[int], float]:
        """Return (indices, sampled frames per second).

        Raises:
            VideoError: When the video, or the chosen part of it, holds too few frames.
        """
        first, last = self._range(info)
        total = last - first + 1
        seconds = total / info.fps
        if info.variable_rate:
            seconds = info.timestamps[last] - info.timestamps[first] + 1 / info.fps
        count = self._count(info.path, total, seconds)
        if info.variable_rate:
            times = torch.linspace(info.timestamps[first], info.timestamps[last], count, dtype=torch.float64)
            indices = [_on_screen(info, t, first, last) for t in times.tolist()]
        else:
            indices = torch.linspace(first, last, count).round().long().tolist()
        return indices, count / seconds

    def fault(self) -> str | None:
        """Why no video at all can be sampled so; None where some can."""
        if self.video_end is not None and (self.video_start or 0.0) >= self.video_end:
            return f"video_end: expected more than video_start ({self.video_start or 0:g}), got {self.video_end:g}"
        name = "max_frames" if self.nframes is None else "nframes"
        wanted = getattr(self, name)
        rounded = math.floor if self.nframes is None else round
        if rounded(wanted / self.frame_factor):
            return None
        return f"{name} is {wanted}, and the model sees {self.frame_factor} frames at a time"

    def _count(self, path: str, total: int, seconds: float) -> int:
        factor = self.frame_factor
        fault = self.fault()
        if fault is not None:
            raise VideoError(path, fault)
        if self.nframes is not None:
            count = round(self.nframes / factor) * factor
        else:
            least = math.ceil(self.min_frames / factor) * factor
            most = math.floor(min(self.max_frames, total) / factor) * factor
            wanted = min(min(max(seconds * self.fps, least), most), total)
            count = math.floor(wanted / factor) * factor
        if not factor <= count <= total:
            held = f"holds {total} frame{'s' if total != 1 else ''}"
            raise VideoError(path, f"{held}, but {max(count, factor)} are to be sampled")
        return count

    def _range(self, info: VideoInfo) -> tuple[int, int]:
        """Return the first and last index between `video_start` and `video_end`."""
        first, last = 0, info.frames - 1
        start, end = self.video_start, self.video_end
        if info.variable_rate:
            if start is not None:
                first = bisect_left(info.timestamps, start)
            if end is not None:
                last = bisect_right(info.timestamps, end) - 1
        else:
            length = info.frames / info.fps
            if start is not None:
                first = math.ceil(min(start, length) * info.fps)
            if end is not None:
                last = min(math.floor(min(end, length) * info.fps), info.frames - 1)
        if (start is not None or end is not None) and first >= last:
            raise VideoError(
                info.path,
                f"no frames between {start or 0:g} s and {info.duration if end is None else end:g} s"
                f" of a video of {info.duration:.2f} s",
            )
        return first, last


def sample_indices(
    info: VideoInfo,
    *,
    fps: float = 2.0,
    nframes: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
    frame_factor: int = 2,
    video_start: float | None = None,
    video_end: float | None = None,
) -> list[int]:
    """Return the frames to decode, as qwen-vl-utils chooses them.

    At an even frame rate the choice is its published arithmetic to the frame. At an uneven one, where equal
    steps of the index are unequal steps of time, it is the frame on screen at each of equally spaced moments.

    Args:
        info: The probed video.
        fps: Frames per second of video; ignored when `nframes` is given.
        nframes: This many frames, rounded to a multiple of `frame_factor`.
        min_frames: Fewest frames under `fps`.
        max_frames: Most frames under `fps`.
        frame_factor: The number of frames is a multiple of this.
        video_start: Seconds; earlier frames are left out.
        video_end: Seconds; later frames are left out.

    Raises:
        VideoError: When the video, or the chosen part of it, holds too few frames.
    """
    sampling = FrameSampling(fps, nframes, min_frames, max_frames, frame_factor, video_start, video_end)
    return sampling.sample(info)[0]


def _on_screen(info: VideoInfo, seconds: float, first: int, last: int) -> int:
    """Return the frame shown at `seconds`: the last one that is not later."""
    return min(max(bisect_right(info.timestamps, seconds + 1e-9) - 1, first), last)
