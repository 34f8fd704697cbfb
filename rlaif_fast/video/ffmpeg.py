"""Reading video files through FFmpeg (PyAV): which frames a file holds, and the pixels of some of them.

This file, `container.py`, `display.py` and `scan.py` import no torch, directly or indirectly, so that a decoding
process (see `worker.py`) starts in a fifth of a second and takes 60 MB.

`scan` reads every packet header once and writes down the presentation time of each frame that a player would
show: hidden reference frames (VP8), packets that an edit list cuts off and frames before time zero are left
out. A frame's index is its place in that list, whichever decoder delivers it. `read_frames` then decodes from
the key frame before each wanted index and accepts a picture only if it carries exactly the time that was
asked for. No frame is ever replaced by a neighbour: one that does not come out whole raises `BadVideo`.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from rlaif_fast.errors import needed_by
from rlaif_fast.video.container import BadVideo, check_file
from rlaif_fast.video.display import mirrored, rotation
from rlaif_fast.video.headers import SIZES, Size
from rlaif_fast.video.scan import Scan, seconds_since_first

with needed_by("reading videos", "train"):
    import av

# Containers that hold their own frames. Playlists (hls, dash), lists (concat), numbered pictures (image2) and the like
# name other files, and are refused.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,live_flv,asf,asf_o,ogg,gif,apng,ivf,obu,av1,"
    "h264,hevc,vvc,h263,vc1,rm,mxf,nut,wtv,dv,nsv,swf,y4m,yuv4mpegpipe,mjpeg,webp_pipe,dirac,cavsvideo,gxf,ipmovie,viv,"
    "filmstrip,smk,bink,roq,flic,film_cpk,4xm"
)
NOT_VIDEO_CODECS = {"ansi", "bintext", "xbin", "idf"}  # FFmpeg renders text files as pictures
FIRST_FRAME_PACKETS = 256  # packets tried before a stream counts as undecodable
PYAV = int(av.__version__.partition(".")[0])
# Text that is not UTF-8 must not make a video unreadable; from 19 on PyAV decodes it leniently by itself.
METADATA: Any = {"metadata_errors": "replace"} if PYAV < 19 else {}
STRICT = {"err_detect": "explode"}  # else FFmpeg conceals damage by pasting from other frames
CONSTANT_RATE_TOLERANCE = 0.02  # share of a frame interval that container rounding may shift a timestamp


def scan(path: str) -> Scan:
    """Read the packet headers of `path` and decode its first frame.

    Raises:
        BadVideo: With the reason.
    """
    check_file(path)
    with _open(path) as container:
        stream = _video_stream(container)
        packets = list(_packet_facts(container, stream))
        if not packets:
            raise BadVideo("the video stream holds no frames")
        if any(p.corrupt for p in packets):
            raise BadVideo("damaged: the container marks packets as corrupt")
        # AVI has no presentation times; one cannot seek to those that FFmpeg invents for reordered frames.
        unordered = container.format.name == "avi" and stream.codec_context.has_b_frames
        found = _summarise(path, stream, packets, unordered)
        return replace(found, plain=found.plain and _has_one_video(container))


def read_frames(
    path: str, info: Scan, indices: Sequence[int], *, threads: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, frame (H, W, 3) uint8 RGB upright) for each distinct index, ascending.

    Args:
        path: The file.
        info: Its scan.
        indices: Wanted frames, in any order, repeats allowed.
        threads: FFmpeg's decoding threads; 0 lets it choose.

    Raises:
        BadVideo: When a wanted frame does not exist or cannot be decoded whole.
    """
    wanted = sorted(set(indices))
    if wanted and (wanted[0] < 0 or wanted[-1] >= len(info.pts)):
        raise BadVideo(
            f"frame {wanted[-1] if wanted[0] >= 0 else wanted[0]} of {len(info.pts)} was asked for"
        )
    convert = av.video.reformatter.VideoReformatter()
    with _Reader(path, info, wanted, threads) as reader:
        for index in wanted:
            frame = reader.frame(index)
            # More threads take longer to start than to convert a small frame, and gain nothing on a large one.
            picture = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
            if picture.shape[:2] != (info.height, info.width):
                raise BadVideo(
                    f"frame {index} is {frame.width}x{frame.height}, the first {info.width}x{info.height}"
                )
            picture = picture[::-1] if info.mirrored else picture
            yield index, np.ascontiguousarray(np.rot90(picture, -(info.rotation // 90)))


class _Reader:
    """Walks through a file, seeking to a later key frame when that skips work."""

    def __init__(self, path: str, info: Scan, wanted: Sequence[int], threads: int) -> None:
        self.path, self.info, self.threads = path, info, threads
        self.wanted = {info.pts[i] for i in wanted}
        self.place = {pts: i for i, pts in enumerate(info.pts)}
        self.linear = info.counted
        self.back = 0  # how many key frames earlier to start than the frame needs
        self._open()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.frames.close()
        self.container.close()

    def frame(self, index: int) -> Any:
        """Return the decoded picture of `index`; indices come ascending."""
        if self.linear:
            return self._advance(index)
        key = max(bisect_right(self.info.keys, self.info.pts[index]) - 1 - self.back, 0)
        if key > 0 and self.info.keys[key] > self.info.pts[max(self.reached, 0)]:
            self._seek(self.info.keys[key])
        try:
            return self._advance(index)
        except BadVideo as error:
            if isinstance(error, _NotFoundError) or (self.back and not self.on_key):
                # Some containers cannot seek where their packets say; then only reading from the start is exact.
                self.linear = True
                self.__exit__()
                self._open()
                return self._advance(index)
            if self.back or not self.sought:
                raise
            # In an open group of pictures, frames after a key frame depend on frames before it; that is no damage. Only
            # one thread tells where that was.
            self.back = self.threads = 1
            self.__exit__()
            self._open()
            self._seek(self.info.keys[max(key - 1, 0)])
            return self.frame(index)

    def _open(self) -> None:
        self.container = _open(self.path)
        self.stream = _video_stream(self.container)
        self.stream.codec_context.options = STRICT
        self.stream.codec_context.thread_count = self.threads
        # With frame threads the decoder would read `skip_frame` too late; external libraries read it only when opened.
        own = not self.stream.codec_context.codec.name.startswith("lib")
        self.skips = self.threads == 1 and own and not self.info.counted
        if self.threads != 1:
            self.stream.thread_type = "AUTO"
        self.sought = False
        self._start()

    def _seek(self, pts: int) -> None:
        self.frames.close()
        self.container.seek(pts, stream=self.stream, backward=True)
        self.stream.codec_context.flush_buffers()
        self.sought = True
        self._start()

    def _start(self) -> None:
        self.bad_orders: list[int] = []
        self.reached = -1  # index of the last frame that came out
        self.on_key = True  # whether reading began at a key frame
        self.frames = self._decode()

    def _advance(self, index: int) -> Any:
        for found, frame in self.frames:
            self.reached = found
            if found == index:
                self._check_whole(index, frame)
                return frame
            if found > index:
                break
        if self.bad_orders:
            raise BadVideo(f"frame {index} depends on damaged data")
        raise _NotFoundError(f"frame {index} is in the container but does not decode")

    def _check_whole(self, index: int, frame: Any) -> None:
        if frame.is_corrupt:
            raise BadVideo(f"frame {index} is damaged")
        if not self.bad_orders:
            return
        own = self.info.order[index]
        # A frame that is shown before a key frame but follows it in the file also builds on the key frame before.
        key = bisect_right(self.info.keys, self.info.pts[index]) - 1
        start = self.info.key_order[key] if key >= 0 else 0
        if any(start <= bad <= own for bad in self.bad_orders) or self.info.counted:
            raise BadVideo(f"frame {index} depends on damaged data")

    def _decode(self) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, frame) as pictures come out; pictures without an index are passed over."""
        count = 0
        context = self.stream.codec_context
        for number, packet in enumerate(self.container.demux(self.stream)):
            if number == 0 and self.sought:
                self.on_key = packet.is_keyframe
            if self.skips:  # frames that no other frame builds on
                context.skip_frame = "DEFAULT" if packet.pts in self.wanted else "NONREF"
            try:
                frames = packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                place = self.place.get(packet.pts)
                if place is not None:
                    self.bad_orders.append(self.info.order[place])
                elif packet.dts is not None:
                    raise BadVideo("damaged data between the frames") from None
                continue
            for frame in frames:
                if self.info.counted:
                    yield count, frame
                    count += 1
                elif frame.pts in self.place:
                    yield self.place[frame.pts], frame


class _NotFoundError(BadVideo):
    pass


@dataclass(frozen=True)
class _Packet:
    pts: int | None
    dts: int | None
    duration: int
    key: bool
    shown: bool
    corrupt: bool
    size: Size | None


def _packet_facts(container: Any, stream: Any) -> Iterator[_Packet]:
    codec = stream.codec_context.codec.canonical_name
    size_of = SIZES.get(codec, lambda data, extradata: None)
    extradata = bytes(stream.codec_context.extradata or b"")
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            # RFC 6386, 9.1: bit 4 of the first byte of a VP8 frame says whether it is shown.
            data = memoryview(packet)
            shown = not packet.is_discard and not (codec == "vp8" and not data[0] & 0x10)
            times = packet.pts, packet.dts, packet.duration or 0
            yield _Packet(*times, packet.is_keyframe, shown, packet.is_corrupt, size_of(data, extradata))
    except av.error.FFmpegError as error:
        raise BadVideo(f"damaged: {_plain(error)}") from None


def _summarise(path: str, stream: Any, packets: list[_Packet], unordered: bool) -> Scan:
    base = stream.time_base or Fraction(1, 1000)
    times: list[Any] = [p.pts for p in packets if p.shown]
    counted = unordered or None in times or len(set(times)) < len(times)
    if counted:
        times = [p.dts if p.dts is not None else p.pts for p in packets if p.shown]
        if None in times or len(set(times)) < len(times):
            times = _times_by_rate(stream, base, len(times))
    numbered = sorted(zip(times, (o for o, p in enumerate(packets) if p.shown), strict=True))
    if not counted:
        numbered = [(t, o) for t, o in numbered if t >= 0]
    if not numbered:
        raise BadVideo("every frame lies before time zero")
    pts = tuple(t for t, _ in numbered)
    keys = sorted((p.pts, o) for o, p in enumerate(packets) if p.key and p.pts is not None)
    first = _first_frame(path)
    fps, duration, variable = _rate(stream, pts, base, packets)
    return Scan(
        codec=stream.codec_context.codec.canonical_name,
        width=first.width,
        height=first.height,
        pixel_format=first.format.name,
        colorspace=int(first.colorspace),
        rotation=rotation(first),
        mirrored=mirrored(first),
        fps=fps,
        duration=duration,
        pts=pts,
        order=tuple(o for _, o in numbered),
        keys=tuple(k for k, _ in keys),
        key_order=tuple(sorted(o for _, o in keys)),
        time_base=base,
        variable_rate=variable,
        counted=counted,
        plain=not counted and len(pts) == len(packets) and len({p.size for p in packets} - {None}) <= 1,
    )


def _times_by_rate(stream: Any, base: Fraction, count: int) -> list[int]:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise BadVideo("the file has neither frame times nor a frame rate")
    return [round(i / rate / base) for i in range(count)]


def _rate(
    stream: Any, pts: Sequence[int], base: Fraction, packets: list[_Packet]
) -> tuple[float, float, bool]:
    """Return (frames per second, seconds, whether the spacing varies)."""
    n = len(pts)
    declared = float(stream.average_rate or 0.0)
    if n == 1:
        length = next((float(p.duration * base) for p in packets if p.duration > 0), 0.0)
        fps = declared or (1 / length if length else 1.0)
        return fps, 1 / fps, False
    times = seconds_since_first(pts, base)
    span = times[-1]
    measured = (n - 1) / span
    # A container rounds each time to its time base; the declared rate has no such error where it fits.
    rounding = float(base) + CONSTANT_RATE_TOLERANCE * span / (n - 1)
    if declared and all(abs(time - i / declared) <= rounding for i, time in enumerate(times)):
        return declared, n / declared, False
    even = all(abs(time - i / measured) <= rounding for i, time in enumerate(times))
    return measured, span + 1 / measured, not even


def _first_frame(path: str) -> Any:
    """Return the first picture that decodes, from a fresh container (a scan leaves its own at the end)."""
    with _open(path) as container:
        stream = _video_stream(container)
        stream.codec_context.options = STRICT
        stream.codec_context.thread_count = 1  # more would be started for one frame
        for number, packet in enumerate(container.demux(stream)):
            try:
                for frame in packet.decode():
                    return frame
            except av.error.EOFError:
                break
            except av.error.FFmpegError:
                if number >= FIRST_FRAME_PACKETS:
                    break
    raise BadVideo("no frame can be decoded")


def _video_stream(container: Any) -> Any:
    """The video stream that players show: the default one, else the one with the most frames and bits."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        kinds = sorted({s.type for s in container.streams})
        raise BadVideo(f"no video stream ({', '.join(kinds) if kinds else 'no streams at all'})")
    if stream.codec_context.name in NOT_VIDEO_CODECS:
        raise BadVideo(f"not a video (FFmpeg reads it as {stream.codec_context.name} text)")
    return stream


def _has_one_video(container: Any) -> bool:
    """Whether a file has exactly one video stream, not counting cover pictures."""
    cover = av.stream.Disposition.attached_pic
    return sum(not stream.disposition & cover for stream in container.streams.video) == 1


def _open(path: str) -> Any:
    try:
        # An absolute path cannot be taken for a protocol ("a:b.mp4"), and no playlist may reach the network.
        whole = os.path.abspath(path)  # noqa: PTH100
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        return av.open(whole, options=options, **METADATA)
    except av.error.FFmpegError as error:
        if error.errno == errno.EINVAL:
            raise BadVideo(
                "not a video of a kind that is read, or damaged (playlists and lists of files are not followed)"
            ) from None
        raise BadVideo(f"not a readable video: {_plain(error)}") from None
    except OSError as error:
        raise BadVideo(f"cannot be read: {error.strerror}") from None


def _plain(error: Any) -> str:
    return (error.strerror or type(error).__name__).lower()
