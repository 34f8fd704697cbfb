"""The size of its picture that a compressed frame names itself; a film's may change on the way."""

from __future__ import annotations

from collections.abc import Callable

Size = tuple[int, int]  # (width, height)

_VP9_RGB = 7  # colour space
_MJPEG_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # markers among those of frames, 0xC0 to 0xCF


def _vp8(data: memoryview) -> Size | None:
    """RFC 6386, 9.1: key frames alone name it."""
    if data[0] & 1 or len(data) < 10:
        return None
    return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF


def _vp9(data: memoryview) -> Size | None:
    """VP9 bitstream specification, 6.2 and 7.2: frames that do not take it from another name it."""
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
    if take(1):  # a frame that was decoded before is shown
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


def _mjpeg(data: memoryview) -> Size | None:
    """ITU-T T.81, B.2: the frame header stands among the segments before the scan."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in _MJPEG_NO_FRAMES:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


# Of the codecs that DALI decodes on a CPU, by canonical name.
SIZES: dict[str, Callable[[memoryview], Size | None]] = {"vp8": _vp8, "vp9": _vp9, "mjpeg": _mjpeg}
