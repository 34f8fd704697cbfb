"""Media of a row and of message parts: each of their keys is used, or refused by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rlaif_fast.data.errors import RowError
from rlaif_fast.video.refs import Cut

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov")
MEDIA_KEYS = ("video", "videos", "image", "images")  # of a row
SECONDS = ("video_start", "video_end")
COUNTS = ("nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
CUT_KEYS = (*SECONDS, "fps", *COUNTS)
OF_IMAGES = ("min_pixels", "max_pixels")
# What other datasets call them.
_ELSEWHERE = {
    "start": "video_start",
    "start_time": "video_start",
    "end": "video_end",
    "end_time": "video_end",
    "num_frames": "nframes",
    "video_fps": "fps",
}
NAMES = {
    "video": "video",
    "video_url": "video",
    "image": "image",
    "image_url": "image",
    "path": "",
    "url": "",
}


@dataclass
class Medium:
    """A medium before its path is resolved: a file, a folder of frames, or the files of the frames."""

    kind: str  # "video" or "image"
    path: str
    cut: Cut = field(default_factory=Cut)
    frames: tuple[str, ...] = ()
    # possible file names if the path is unknown: without folder, and maybe without suffix
    names: tuple[str, ...] = ()


def read_cut(values: Mapping[str, Any], kind: str, default: Cut | None = None) -> Cut:
    """The part of a medium that the keys of `values` name.

    Args:
        values: A row or a message part.
        kind: "video" or "image"; for a picture only the bounds on its pixels can be given.
        default: What applies if a key is absent.

    Raises:
        RowError: A value is out of range, or two exclude each other.
    """
    found: dict[str, Any] = dict((default or Cut()).given())
    if kind == "image":
        found = {key: value for key, value in found.items() if key in OF_IMAGES}
    for key in CUT_KEYS:
        value = values.get(key)
        if value is None:
            continue
        if kind == "image" and key not in OF_IMAGES:
            raise RowError(f"{key}: a picture has none")
        found[key] = _number(key, value)
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        if low in found and high in found and found[low] > found[high]:
            raise RowError(f"{low}: expected at most {high} ({found[high]}), got {found[low]}")
    if "video_end" in found and found.get("video_start", 0.0) >= found["video_end"]:
        raise RowError(f"video_end: expected more than video_start, got {found['video_end']}")
    for key in ("fps", "min_frames", "max_frames"):
        if values.get(key) is not None and values.get("nframes") is not None:
            raise RowError(f"{key}: give it or nframes, not both")
    return Cut(**found)


def _number(key: str, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e15 < value < 1e15:
        raise RowError(f"{key}: expected a number, got {value!r:.60}")
    if key in COUNTS:
        if value != int(value) or value < 1:
            raise RowError(f"{key}: expected a whole number of at least 1, got {value!r:.60}")
        return int(value)
    if not math.isfinite(value) or value < 0 or (key == "fps" and value == 0):
        raise RowError(
            f"{key}: expected {'more than 0' if key == 'fps' else 'seconds of at least 0'}, got {value!r:.60}"
        )
    return float(value)


def read_medium(value: Any, kind: str, key: str, default: Cut | None = None) -> Medium:
    """A medium given as a path, as a mapping with a path, or (a video) as a list of the paths of its frames.

    Raises:
        RowError: It is none of these, is not a local file, or has an unused key.
    """
    if isinstance(value, Mapping):
        return _from_mapping(value, kind, key, default)
    cut = read_cut({}, kind, default)
    if isinstance(value, list):
        if kind != "video":
            raise RowError(f"{key}: expected the path of a picture, got a list")
        frames = tuple(_path(item, key) for item in value)
        if not frames:
            raise RowError(f"{key}: an empty list of frames")
        return Medium(kind, frames[0], cut, frames)
    return Medium(kind, _path(value, key), cut)


def _from_mapping(value: Mapping[str, Any], kind: str, key: str, default: Cut | None) -> Medium:
    if value.get("bytes") is not None:
        raise RowError(f"{key}: holds the bytes of a file; write them to a file and give its path")
    named = [name for name in NAMES if value.get(name) is not None]
    known = {*NAMES, *CUT_KEYS, "type", "bytes"}
    unknown = [str(name) for name in value if name not in known and value[name] is not None]
    if unknown:
        raise RowError(
            f"{key}: the key {unknown[0]!r:.60} of a {kind} is not used; use {', '.join(CUT_KEYS)}"
        )
    if len(named) != 1 or NAMES[named[0]] not in ("", kind):
        raise RowError(f"{key}: expected the path of a {kind}, got {dict(value)!r:.60}")
    inner = value[named[0]]
    found = read_medium(inner, kind, key, default)
    found.cut = read_cut(value, kind, found.cut)
    return found


def _path(value: Any, key: str) -> str:
    if isinstance(value, Mapping):
        return _from_mapping(value, "image", key, None).path
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key}: expected the path of a file, got {value!r:.60}")
    if value.startswith(("http://", "https://", "data:", "s3://", "gs://", "hf://")):
        raise RowError(f"{key}: {value:.60} is not a local file; download it and give its path")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise RowError(f"{key}: {value!r:.60} is no path that a file can have")
    return value.removeprefix("file://")


def row_media(row: Mapping[str, Any]) -> list[Medium]:
    """The media that `video`, `videos`, `image` and `images` of a row name, videos first."""
    found = []
    for key in MEDIA_KEYS:
        value = row.get(key)
        if value is None:
            continue
        kind = key.rstrip("s")
        default = row_cut(row, kind)
        if key == "video" and isinstance(value, list) and value and all(map(_is_frame, value)):
            found.append(read_medium(value, kind, key, default))  # one video, given as its frames
            continue
        if key == "videos" and isinstance(value, list) and len(value) > 1 and all(map(_is_still, value)):
            raise RowError(
                f"videos: {value[0]!r:.60} is a picture; give the frames of a video as a list in the list"
            )
        for item in value if isinstance(value, list) else [value]:
            found.append(read_medium(item, kind, key, default))
    return found


def row_cut(row: Mapping[str, Any], kind: str) -> Cut:
    """What the row's own keys say about all its media of one kind."""
    names = CUT_KEYS if kind == "video" else OF_IMAGES
    return read_cut({key: row.get(key) for key in names}, kind)


@lru_cache(1024)
def cut_key_like(key: str) -> str | None:
    """The key of `CUT_KEYS` that a key of a row is like; None if it is like none, or is one."""
    if key in CUT_KEYS:
        return None
    return _ELSEWHERE.get(key) or next(iter(difflib.get_close_matches(key, CUT_KEYS, 1, 0.85)), None)


def refuse_idle_cut(row: Mapping[str, Any], media: Iterable[Medium]) -> None:
    """Refuse a key that says which part of a row's media is seen, if the row has no media of that kind.

    Raises:
        RowError: Names the key.
    """
    kinds = {medium.kind for medium in media}
    for key in CUT_KEYS if "video" not in kinds else ():
        if row.get(key) is not None and not (kinds and key in OF_IMAGES):
            raise RowError(f"{key}: the row has no video" + (" or picture" if key in OF_IMAGES else ""))


def _is_still(value: Any) -> bool:
    """Whether an item is a picture that does not move."""
    return _is_frame(value) and not value.casefold().endswith((".gif", ".webp"))


def _is_frame(value: Any) -> bool:
    """Whether an item of `video` is a picture: a list of pictures is one video."""
    return isinstance(value, str) and value.casefold().endswith(PICTURE_SUFFIXES)
