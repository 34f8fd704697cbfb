"""Picture sizes read from compressed frames: the size may change in the middle of a video.

Each function takes a packet and the codec's header from the container (FFmpeg's extradata).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

Size = tuple[int, int] | bytes  # (width, height), or the header that names them among other things

_VP9_RGB = 7  # colour space
_AV1_SEQUENCE = 1  # OBU type of a sequence header
_MJPEG_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # the markers from 0xC0 to 0xCF that do not start a frame


def _vp8(data: memoryview, extradata: bytes) -> Size | None:
    """RFC 6386, 9.1: key frames alone name it."""
    if data[0] & 1 or len(data) < 10:
        return None
    return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF


def _vp9(data: memoryview, extradata: bytes) -> Size | None:
    """VP9 bitstream specification, 6.2 and 7.2: frames that do not take it from a reference frame name it."""
    head = int.from_bytes(bytes(data[:24]).ljust(24, b"\0"), "big")
    left = 8 * 24

    def take(bits: int) -> int:
        nonlocal left
        left -= bits
        return head >> left & ((1 << bits) - 1)

    def skip_colour() -> None:
        if profile >= 2:
            take(1)
        if take(3) != _VP9_RGB:
            take(4 if profile % 2 else 1)
        elif profile % 2:
            take(1)

    take(2)
    profile = take(1) + 2 * take(1)
    if profile == 3:
        take(1)
    if take(1):  # shows a frame that was decoded before
        return None
    inter, shown, resilient = take(1), take(1), take(1)
    if not inter:
        take(24)
        skip_colour()
    else:
        intra = not shown and take(1)
        take(0 if resilient else 2)
        if intra:
            take(24)
            if profile:
                skip_colour()
            take(8)
        else:
            take(20)
            if any(take(1) for _ in range(3)):
                return None
    return 1 + take(16), 1 + take(16)


def _mjpeg(data: memoryview, extradata: bytes) -> Size | None:
    """ITU-T T.81, B.2: the frame header is among the segments before the scan."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in _MJPEG_NO_FRAMES:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _parameters(
    kind_of: Callable[[int], int], kinds: range, data: memoryview, extradata: bytes
) -> Size | None:
    """The codec header in a packet, else the one in the container.

    Args:
        kind_of: The kind of a part, from its first byte.
        kinds: Those of headers.
        data: The packet.
        extradata: What the container has.
    """
    own = b"".join(part for part in _parts(data) if kind_of(part[0]) in kinds)
    return own if own and own not in extradata else extradata or None


def _parts(data: memoryview) -> Sequence[bytes | memoryview]:
    """The parts of a packet, each after its length (MP4, Matroska) or after a start code."""
    at, found = 0, []
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if at == len(data):
        return [part for part in found if len(part)]
    return [part for part in (piece.rstrip(b"\0") for piece in bytes(data).split(b"\0\0\1")) if part]


def _av1(data: memoryview, extradata: bytes) -> Size | None:
    """AV1 bitstream specification, 5.3: the sequence header. The container's may differ in other fields."""
    at = 0
    while at < len(data):
        kind, extended, sized = data[at] >> 3 & 15, data[at] & 4, data[at] & 2
        at += 2 if extended else 1
        length = 0 if sized else len(data) - at
        for shift, byte in zip(range(0, 56, 7), data[at:]) if sized else ():
            length |= (byte & 127) << shift
            at += 1
            if byte < 128:
                break
        if kind == _AV1_SEQUENCE:
            return bytes(data[at : at + length])
        at += length
    return None


# Of the codecs that DALI decodes, by canonical name.
SIZES: dict[str, Callable[[memoryview, bytes], Size | None]] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "mjpeg": _mjpeg,
    # ITU-T H.264, 7.3.1; H.265, 7.3.1.2; ISO/IEC 14496-2, 6.2.1
    "h264": partial(_parameters, lambda head: head & 31, range(7, 8)),
    "hevc": partial(_parameters, lambda head: head >> 1 & 63, range(33, 34)),
    "mpeg4": partial(_parameters, lambda head: head, range(0x20, 0x30)),
    "av1": _av1,
}
