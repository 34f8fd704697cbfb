"""A video file before it is opened: whether it can be complete, and a digest of its content."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from typing import BinaryIO

WHOLE_DIGEST_BYTES = 256 << 20  # larger files are digested in DIGEST_BLOCKS evenly spread blocks
DIGEST_BLOCKS = 256
DIGEST_BLOCK_BYTES = 1 << 20
CLUSTER = b"\x1fC\xb6u"  # of Matroska, holds the frames


class BadVideo(Exception):
    """The file cannot be used; the message is the reason, without the path."""


def digest(path: str) -> str:
    """Return a digest of a file's content; of a very large one, of its size and of blocks spread over it."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            size = file.seek(0, os.SEEK_END)
            found = hashlib.blake2b(str(size).encode(), digest_size=20)
            file.seek(0)
            if size <= WHOLE_DIGEST_BYTES:
                while block := file.read(DIGEST_BLOCK_BYTES):
                    found.update(block)
            else:
                for i in range(DIGEST_BLOCKS):
                    file.seek((size - DIGEST_BLOCK_BYTES) * i // (DIGEST_BLOCKS - 1))
                    found.update(file.read(DIGEST_BLOCK_BYTES))
    except FileNotFoundError:
        raise BadVideo("does not exist") from None
    except OSError as error:
        raise BadVideo(f"cannot be read: {error.strerror}") from None
    return found.hexdigest()


def check_file(path: str) -> None:
    """Refuse a file that is not regular, cannot be read, or is shorter than its own container says.

    Raises:
        BadVideo: With the reason.
    """
    try:
        facts = os.stat(path)  # noqa: PTH116 - the path is a str throughout this file
        if stat.S_ISDIR(facts.st_mode):
            raise BadVideo("is a folder, not a video")
        if not stat.S_ISREG(facts.st_mode):
            raise BadVideo("is not a regular file")
        if facts.st_size == 0:
            raise BadVideo("empty file")
        with open(path, "rb") as file:  # noqa: PTH123
            _check_length(file, facts.st_size)
    except FileNotFoundError:
        raise BadVideo("does not exist") from None
    except OSError as error:
        raise BadVideo(f"cannot be read: {error.strerror}") from None


def _check_length(file: BinaryIO, size: int) -> None:
    """Refuse a file that is shorter than its own container says (a broken download)."""
    head = file.read(64)
    end = None
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        end = _end_of_boxes(file, size)
    elif head[:4] == b"\x1aE\xdf\xa3":
        end = _end_of_segment(head, file, size)
    elif head[:4] == b"RIFF":
        end = 8 + struct.unpack("<I", head[4:8])[0]
        if head[8:12] == b"AVI " and end <= size + 1:
            _check_index(file, end)
    elif head[:4] == b"FLV\x01":
        end = _end_of_tags(file, size)
    if end is not None and end > size + 1:  # RIFF chunks may lack the padding byte
        raise BadVideo(f"truncated: the container spans {end} bytes, the file has {size}")


def _end_of_boxes(file: BinaryIO, size: int) -> int | None:
    """Return where the last top-level box of an MP4 or MOV ends; None when that is left open, or no box follows."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length, name = struct.unpack(">I4s", file.read(8))
        if not all(0x20 <= letter < 0x7F or letter == 0xA9 for letter in name):
            return None  # readers ignore what follows the video
        if length == 1:
            wide = file.read(8)
            if len(wide) < 8:
                return at + 16
            length = struct.unpack(">Q", wide)[0]
        if length < 8:
            return None
        at += length
    return at


def _end_of_segment(head: bytes, file: BinaryIO, size: int) -> int | None:
    """Return where the Segment of a Matroska or WebM file ends; None when its size is declared unknown.

    Raises:
        BadVideo: The elements in it do not follow one another. Readers skip such a part, and frames go missing.
    """
    length, width = _ebml_size(head, 4)
    at = 4 + width + length
    if head[at : at + 4] != b"\x18S\x80g":
        return None
    length, width = _ebml_size(head, at + 4)
    start = at + 4 + width
    if length == _unknown_size(width):
        return None
    if start + length <= size:
        _check_elements(file.fileno(), start, start + length, into=CLUSTER)
    return start + length


def _check_elements(file: int, at: int, end: int, into: bytes = b"") -> None:
    """Refuse a span with an invalid element, or one that reaches beyond it; descend into elements called `into`."""
    while at < end:
        head = os.pread(file, 12, at)
        id_width = 9 - head[0].bit_length()
        sized = id_width <= 4 and any(head[id_width : id_width + 1])
        length, width = _ebml_size(head, id_width)
        if sized and length == _unknown_size(width):
            return  # a live recording: it ends where the next one begins
        start = at + id_width + width
        if not sized or start + length > end:
            raise BadVideo(f"damaged: no element of the container at byte {at}")
        if into and head.startswith(into):
            _check_elements(file, start, start + length)
        at = start + length


def _check_index(file: BinaryIO, end: int) -> None:
    """Refuse an AVI file whose index names frames where there are none: readers take the next frame, at a wrong time.

    The offsets count from the list of frames, or from the start of the file. An index whose first frame is at neither
    is of an unknown kind, and is not checked.
    """
    at, frames, index = 12, None, b""
    while at + 8 <= end and not index:
        name, length, kind = struct.unpack("<4sI4s", os.pread(file.fileno(), 12, at).ljust(12, b"\0"))
        if name == b"LIST" and kind == b"movi":
            frames = at + 8
        elif name == b"idx1":
            index = os.pread(file.fileno(), min(length, end - at), at + 8)
        at += 8 + length + length % 2
    parts = struct.iter_unpack("<4s3I", index[: len(index) // 16 * 16])
    # An entry of no bytes repeats the frame before.
    entries = [(name, place) for name, _, place, size in parts if size]
    if frames is None or not entries:
        return
    name, first = entries[0]
    for start in (frames, 0):
        if os.pread(file.fileno(), 4, start + first) == name:
            break
    else:
        return
    for name, place in entries:
        if os.pread(file.fileno(), 4, start + place) != name:
            raise BadVideo(f"damaged: the index names a part at byte {start + place}, where there is none")


def _end_of_tags(file: BinaryIO, size: int) -> int:
    """Return where the last tag of an FLV file ends, or where its first tag says that the file does.

    Raises:
        BadVideo: The tags do not follow one another. Readers skip such a part, and frames go missing.
    """
    at = int.from_bytes(os.pread(file.fileno(), 4, 5), "big") + 4
    head = os.pread(file.fileno(), 1 << 16, at)
    declared, found = 0, head.find(b"\0\x08filesize\0")
    if found >= 0:
        declared = int(struct.unpack_from(">d", head.ljust(found + 19, b"\0"), found + 11)[0])
    end = declared if 0 < declared < size else size  # what follows the video is not read
    while at + 11 <= end:
        head = os.pread(file.fileno(), 11, at)
        if head[0] & 0x1F not in (8, 9, 18) or head[8:] != b"\0\0\0":
            raise BadVideo(f"damaged: no part of the container at byte {at}")
        at += 11 + int.from_bytes(head[1:4], "big") + 4
    return max(at - 4, declared)  # the last four bytes repeat a length


def _unknown_size(width: int) -> int:
    return (1 << (7 * width)) - 1


def _ebml_size(head: bytes, at: int) -> tuple[int, int]:
    """Return (value, bytes used) of the variable-length size at `at` (RFC 8794, 4)."""
    if at >= len(head) or head[at] == 0:
        return 0, 1
    width = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + width], "big") & ((1 << (7 * width)) - 1)
    return value, width
