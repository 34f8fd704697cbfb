"""What a video file holds, read once per version of the file."""

from __future__ import annotations

import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlaif_fast.recent import RecentlyUsed
from rlaif_fast.video import ffmpeg
from rlaif_fast.video.base import VideoInfo
from rlaif_fast.video.container import BadVideo, digest
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.isolate import DecodeProcess

MEMO_DIGESTS = 100_000
MEMO_FRAMES = 2_000_000  # frames whose times are remembered, over all files (about 100 bytes each)

V = TypeVar("V")
Version = tuple[str, int, int, int, int]


def probe(path: str | Path) -> VideoInfo:
    """Return what `path` holds: codec, size, frame times, rotation.

    Every packet header is read and the first frame is decoded, so the frame count is the file's own, not its
    header's.

    Raises:
        VideoError: When the file is not a whole, decodable video.
    """
    path = str(path)
    return info_of(path, scan_file(path))


def info_of(path: str, scan: ffmpeg.Scan) -> VideoInfo:
    """Return the public form of a scan."""
    return VideoInfo(
        path=path,
        codec=scan.codec,
        width=scan.width,
        height=scan.height,
        frames=len(scan.pts),
        fps=scan.fps,
        duration=scan.duration,
        timestamps=scan.timestamps,
        rotation=scan.rotation,
        pixel_format=scan.pixel_format,
        variable_rate=scan.variable_rate,
    )


class _Memo(RecentlyUsed[Version, V]):
    """Values by file version, for several threads."""

    def __init__(self, budget: int, **limits: Any) -> None:
        super().__init__(budget, **limits)
        self._lock = threading.Lock()

    def get(self, key: Version) -> V | None:
        with self._lock:
            return super().get(key)

    def put(self, key: Version, value: V) -> None:
        with self._lock:
            super().put(key, value)


SCANS: _Memo[ffmpeg.Scan] = _Memo(MEMO_FRAMES, weigh=lambda scan: len(scan.pts), at_least=1)
DIGESTS: _Memo[str] = _Memo(MEMO_DIGESTS)


def file_version(path: str) -> Version:
    """Return what changes when the file does."""
    try:
        facts = Path(path).stat()
    except FileNotFoundError:
        raise VideoError(path, "does not exist") from None
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL, or a surrogate that no file system encodes
        raise VideoError(path, f"no file can have this path ({error})") from None
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        raise VideoError(path, "is not a regular file")  # opening a pipe would wait forever
    # The inode's change time reveals a copy that kept size and modification time (cp -p).
    return str(Path(path).absolute()), facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_ctime_ns


def check_same(path: str, version: Version) -> None:
    """Refuse what was read from a file that has changed since `file_version`: it may mix both versions.

    Raises:
        VideoError: The file has changed.
    """
    if file_version(path)[:-1] != version[:-1]:  # a new link or mode changes no content
        raise VideoError(path, "changed while it was read")


def scan_file(path: str, process: DecodeProcess | None = None, timeout: float | None = None) -> ffmpeg.Scan:
    """Return the scan of `path`, from memory where the file has not changed; else `process` reads it, if there is one.

    The process digests the file too, within `timeout` seconds in all.
    """
    version = file_version(path)
    known = SCANS.get(version)
    if known is not None:
        return known
    if process is not None:
        known, content = process.scan(path, timeout)
        DIGESTS.put(version, content)
    else:
        try:
            known = ffmpeg.scan(path)
        except BadVideo as error:
            raise VideoError(path, str(error)) from None
        except Exception as error:  # whatever a decoder raises is the file's fault
            raise VideoError(path, f"cannot be read: {type(error).__name__}: {error}") from None
    SCANS.put(version, known)
    return known


def scan_for(decoder: Any, path: str, indices: Sequence[int]) -> ffmpeg.Scan:
    """Return the scan of a file from which a decoder of the table is to read the frames at `indices`.

    Raises:
        VideoError: The decoder refuses such a file, or a frame is not in it.
    """
    scan = scan_file(path)
    reason = decoder.refuses(scan, decoder.device)
    if reason is not None:
        raise VideoError(path, f"decoder {decoder.name!r} cannot read it: {reason}; 'auto' can")
    outside = [i for i in indices if not 0 <= i < len(scan.pts)]
    if outside:
        raise VideoError(path, f"frame {outside[0]} of {len(scan.pts)} was asked for")
    return scan


def file_digest(path: str) -> str:
    """Return a digest of the file's content; above 256 MiB of its size and 256 blocks spread over it."""
    version = file_version(path)
    known = DIGESTS.get(version)
    if known is None:
        try:
            known = digest(path)
        except BadVideo as error:
            raise VideoError(path, str(error)) from None
        DIGESTS.put(version, known)
    return known
