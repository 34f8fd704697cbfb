"""Clips of many files, loaded by worker threads, each once."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlaif_fast.errors import require, require_least, writing
from rlaif_fast.streams import numbered
from rlaif_fast.video.base import Clip
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.clips import load_clip
from rlaif_fast.video.errors import TooManyBadFiles, VideoError, kind_of
from rlaif_fast.video.image import load_frames, load_image
from rlaif_fast.video.isolate import DecodePool
from rlaif_fast.video.preprocess import PixelBudget
from rlaif_fast.video.refs import MediaRef
from rlaif_fast.video.sampling import FrameSampling

log = logging.getLogger(__name__)

MIN_FILES_JUDGED = 50  # `max_bad_fraction` is taken of at least this many files


@dataclass
class LoadStats:
    """What loading has cost so far.

    Attributes:
        clips: Clips loaded.
        dropped: Examples dropped for a bad file.
        bad_files: Distinct bad files, reason by path.
    """

    clips: int = 0
    dropped: int = 0
    bad_files: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the bad files by reason, most frequent first."""
        kinds = Counter(map(kind_of, self.bad_files.values()))
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def load_medium(
    medium: MediaRef,
    sampling: FrameSampling,
    *,
    resize: PixelBudget | None = None,
    cache: ClipCache | None = None,
    **decoding: Any,
) -> Clip:
    """Return the clip of what a row names: a picture, a video that comes as pictures, or a video file.

    Args:
        medium: Its own `cut` takes precedence over `sampling` and `resize`.
        sampling: Which frames of a video.
        resize: Limits on the size of a frame; None keeps full frames.
        cache: Where frames are looked up and kept.
        **decoding: How a video file is decoded: `decoder`, `device`, `process` and `timeout` of `load_clip`.

    Raises:
        VideoError: A file is bad, with the reason.
    """
    resize = None if resize is None else resize.cut(medium.cut)
    if medium.is_image:
        return load_image(medium.path, resize=resize, cache=cache)
    sampling = sampling.cut(medium)
    if medium.frames:
        return load_frames(medium.path, medium.frames, sampling=sampling, resize=resize, cache=cache)
    return load_clip(medium.path, sampling=sampling, resize=resize, cache=cache, **decoding)


class ClipStore:
    """Loads clips, each once: in memory, on disk, or decoded in a process that can be stopped.

    Args:
        sampling: Which frames of a video.
        resize: Pixel limits applied while decoding; None keeps full frames.
        cache: Where clips are kept; None for 512 MiB of memory.
        decoder: "auto" or a name of the decoder table.
        workers: Decoding threads, each with a process of its own where `isolate`.
        isolate: Probe, and decode with PyAV, in processes, so that a hang or a crash there costs one file.
            DALI and torchcodec decode in this process.
        device: Where the frames end up; on a CUDA device "auto" decodes with NVDEC where it can.
        timeout: Seconds a file may take to scan, and again to decode; a slower one is bad.
        quarantine: File that gets one JSON line per bad file; None for none.
        max_bad_fraction: Above this share of bad files `TooManyBadFiles` is raised.
    """

    def __init__(
        self,
        sampling: FrameSampling | None = None,
        *,
        resize: PixelBudget | None = None,
        cache: ClipCache | None = None,
        decoder: str = "auto",
        workers: int = 2,
        isolate: bool = True,
        device: torch.device | str = "cpu",
        timeout: float = 60.0,
        quarantine: str | Path | None = None,
        max_bad_fraction: float = 0.05,
    ) -> None:
        require_least("workers", workers, 1)
        require(0 <= max_bad_fraction <= 1, "max_bad_fraction", "a share in [0, 1]", max_bad_fraction)
        require(timeout > 0, "timeout", "more than 0 seconds", timeout)
        self.workers, self.device = workers, numbered(torch.device(device))
        self.sampling = sampling or FrameSampling()
        self.resize, self.decoder, self.timeout = resize, decoder, timeout
        self.cache = cache if cache is not None else ClipCache()
        self.quarantine = None if quarantine is None else Path(quarantine)
        self.max_bad_fraction = max_bad_fraction
        self.stats = LoadStats()
        self._seen: set[str] = set()
        self._pictures: dict[MediaRef, str] = {}  # of a video that comes as pictures, the bad one
        self._closed = False
        self._lock = threading.Lock()
        self._in_flight: dict[MediaRef, Future[Clip]] = {}
        self._pool = DecodePool(workers) if isolate else None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="clips")

    def load(self, medium: MediaRef | str, *, image: bool = False) -> Clip:
        """Return the clip of a file.

        Args:
            medium: The file, or what a row says of it.
            image: Whether a file given by its path alone is a still picture.

        Raises:
            VideoError: When the file is bad; it is then in quarantine and is not tried again.
            TooManyBadFiles: When that makes too many of them.
        """
        return self.submit(medium, image=image).result()

    def submit(self, medium: MediaRef | str, *, image: bool = False) -> Future[Clip]:
        """Start loading a file and return its future; one that is being loaded already is shared."""
        medium = MediaRef(medium, image) if isinstance(medium, str) else medium
        with self._lock:
            known = self._in_flight.get(medium)
            if known is not None:
                return known
            future = self._threads.submit(self._load, medium)
            self._in_flight[medium] = future
        future.add_done_callback(lambda _: self._landed(medium))
        return future

    def reason(self, medium: MediaRef) -> str | None:
        """Why a medium was found bad; None where it was not."""
        names = (medium.path, _name(medium), self._pictures.get(medium, ""))
        return next((found for name in names if (found := self.stats.bad_files.get(name))), None)

    def close(self) -> None:
        """End the threads and processes. Loads in progress are given up; their files do not count as bad."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> ClipStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _landed(self, medium: MediaRef) -> None:
        with self._lock:
            self._in_flight.pop(medium, None)

    def _load(self, medium: MediaRef) -> Clip:
        reason = self.reason(medium)
        if reason is not None:
            raise VideoError(self._pictures.get(medium, medium.path), reason)
        try:
            clip = self._read(medium)
        except VideoError as error:
            if self._closed:
                raise
            if error.path != medium.path:
                self._pictures[medium] = error.path
                self._set_aside(error)
            else:  # a file without this part may have the other parts
                self._set_aside(VideoError(_name(medium), error.reason))
            raise
        with self._lock:
            self._seen.add(medium.path)
            self.stats.clips += 1
        return clip

    def _read(self, medium: MediaRef) -> Clip:
        lent = self._pool.lend() if self._pool is not None and medium.is_video_file else nullcontext()
        with lent as process:
            return load_medium(
                medium,
                self.sampling,
                resize=self.resize,
                cache=self.cache,
                decoder=self.decoder,
                device=self.device,
                process=process,
                timeout=self.timeout,
            )

    def _set_aside(self, error: VideoError) -> None:
        with self._lock:
            if error.path in self.stats.bad_files:
                return
            self._seen.add(error.path)
            self.stats.bad_files[error.path] = error.reason
            log.warning("dropped %s", error)
            if self.quarantine is not None:
                line = json.dumps({"path": error.path, "reason": error.reason}, ensure_ascii=False)
                if line not in _lines(self.quarantine):  # of another process, or before the run was resumed
                    with writing(self.quarantine), self.quarantine.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
            bad = len(self.stats.bad_files)
            total = max(len(self._seen), MIN_FILES_JUDGED)
            if bad > self.max_bad_fraction * total:
                raise TooManyBadFiles(
                    f"{bad} of {total} files are bad, more than max_bad_fraction={self.max_bad_fraction:g}"
                    f" allows ({self.stats.summary()}); look at {self.quarantine or 'the warnings above'}"
                )


def _name(medium: MediaRef) -> str:
    """What a bad medium is called: its path, and the part of it where that may be at fault."""
    part = ", ".join(f"{key}={value:g}" for key, value in medium.cut.given().items())
    return f"{medium.path} [{part}]" if part else medium.path


def _lines(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
