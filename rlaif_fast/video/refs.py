"""What a row says of a medium: which file, which part of it, how large."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """What part of a medium is seen, and how large; None leaves it to the configuration.

    Attributes:
        video_start: Seconds; earlier frames are left out.
        video_end: Seconds; later frames are left out.
        fps: Frames per second of video that are sampled; of a list of frames, the rate they were taken at.
        nframes: This many frames.
        min_frames: Fewest frames under `fps`.
        max_frames: Most frames under `fps`.
        min_pixels: Fewest pixels of a frame.
        max_pixels: Most pixels of a frame.
        total_pixels: Most pixels of a video.
    """

    video_start: float | None = None
    video_end: float | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None

    def given(self) -> dict[str, float]:
        """The values that are set, by name."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class MediaRef:
    """One medium of a row.

    Attributes:
        path: The file; of a video that comes as pictures, their folder or the first of them.
        is_image: Whether it is a still picture.
        cut: What part of it is seen.
        frames: The pictures of a video that comes as pictures, in order; else empty.
    """

    path: str
    is_image: bool = False
    cut: Cut = Cut()
    frames: tuple[str, ...] = ()

    @property
    def is_video_file(self) -> bool:
        """Whether it is a video in a file of its own, which has to be decoded; else it is read from pictures."""
        return not self.is_image and not self.frames
