"""The table of decoders, and the one place where `decoder="auto"` chooses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.plugins import find
from rlaif_fast.streams import beside, numbered, to_device, used_here
from rlaif_fast.video import ffmpeg
from rlaif_fast.video.base import VideoDecoder
from rlaif_fast.video.container import BadVideo
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.preprocess import RESIZE_CHUNK_BYTES, resize_frames
from rlaif_fast.video.probe import scan_file
from rlaif_fast.video.torchcodec import TorchCodecDecoder

log = logging.getLogger(__name__)

# Where one way overtakes another, measured by bench/bench_video.py (the table is in docs/video.md). On a CPU
# DALI is never more than 7% faster than PyAV, and up to 2.7 times slower where the frames lie close together.
AUTO = {"cuda": ("dali", "pyav"), "cpu": ("pyav",)}  # device -> in order of preference
# From this frame size on, several threads per file pay (2 cores: 1.1 to 1.4 times).
THREADED_PIXELS = 1280 * 720
SMALL, LARGE = 256, 4096  # pixels of a side within which a GPU reads every file of a codec that it reads


class PyAVDecoder:
    """FFmpeg through PyAV: every codec, on the CPU, one frame at a time.

    Only `isolate.DecodeProcess` can stop one that hangs.

    Args:
        device: Where the frames end up; decoding is on the CPU.
        threads: FFmpeg's decoding threads; 0 lets it choose, None takes one for small frames and lets it
            choose for large ones.
    """

    name = "pyav"

    def __init__(self, device: torch.device | str = "cpu", threads: int | None = None) -> None:
        self.device, self.threads = torch.device(device), threads

    @staticmethod
    def unavailable() -> str | None:
        """Return why this decoder cannot run here, or None."""
        return None

    @staticmethod
    def refuses(scan: ffmpeg.Scan, device: torch.device) -> str | None:
        """Return why this decoder cannot read such a file, or None."""
        return None

    def decode(self, path: str, indices: Sequence[int]) -> Tensor:
        """Return frames (F, H, W, 3) uint8 RGB, upright, in the order of `indices`."""
        return self.decode_resized(path, indices, None)

    def decode_resized(self, path: str, indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
        """Like `decode`, resized to (height, width) on the way, so that full frames never pile up."""
        scan = scan_file(path)
        threads = self.threads
        if threads is None:
            threads = 0 if scan.width * scan.height >= THREADED_PIXELS else 1
        try:
            pictures = ffmpeg.read_frames(path, scan, indices, threads=threads)
            frames = assemble(pictures, indices, scan.shape, size)
        except BadVideo as error:
            raise VideoError(path, str(error)) from None
        except Exception as error:  # whatever FFmpeg raises is the file's fault
            raise VideoError(path, f"cannot be decoded: {type(error).__name__}: {error}") from None
        return to_device(frames, self.device)  # a GPU without memory is no fault of the file


# Name -> class: a class made with a device, with `unavailable()` and `decode`; those that "auto" may choose have
# `refuses(scan, device)` too. Other packages add theirs by the entry-point group `rlaif_fast.decoders`.
DECODERS: dict[str, Any] = {"pyav": PyAVDecoder, "dali": DaliDecoder, "torchcodec": TorchCodecDecoder}


def assemble(
    frames: Iterable[tuple[int, np.ndarray]],
    indices: Sequence[int],
    shape: tuple[int, int],
    size: tuple[int, int] | None,
) -> Tensor:
    """Return (F, h, w, 3) uint8 in the order of `indices` from frames that come ascending and without
    repeats.

    Args:
        frames: (index, frame (H, W, 3)); a frame need not stay valid after the next one.
        indices: Wanted order.
        shape: (H, W).
        size: (h, w) to resize to; None keeps `shape`.
    """
    wanted = sorted(set(indices))
    place = {index: i for i, index in enumerate(wanted)}
    out = torch.empty(len(wanted), *(size or shape), 3, dtype=torch.uint8)
    if size is None or tuple(size) == tuple(shape):
        for index, picture in frames:
            out[place[index]] = torch.from_numpy(picture)
    else:
        step = max(1, min(RESIZE_CHUNK_BYTES // (shape[0] * shape[1] * 3), len(wanted)))
        room = torch.empty(step, *shape, 3, dtype=torch.uint8)
        held: list[int] = []
        for index, picture in frames:
            room[len(held)] = torch.from_numpy(picture)
            held.append(place[index])
            if len(held) == step:
                out[held[0] : held[-1] + 1] = resize_frames(room, size)
                held = []
        if held:
            out[held[0] : held[-1] + 1] = resize_frames(room[: len(held)], size)
    if wanted == list(indices):
        return out
    return out[torch.tensor([place[i] for i in indices], dtype=torch.long)]


def choose(name: str, scan: ffmpeg.Scan, device: torch.device) -> str:
    """Return the decoder that `name` ("auto" or one of the table) stands for.

    Raises:
        UsageError: When a decoder asked for by name is unknown or cannot run here.
    """
    if name != "auto":
        reason = _unavailable(name)
        if reason:
            raise UsageError(f"decoder {name!r} cannot run here: {reason}")
        return name
    passed_over: list[str] = []
    for candidate in AUTO.get(device.type, ("pyav",)):
        reason = (
            _unavailable(candidate)
            or DECODERS[candidate].refuses(scan, device)
            or _CANNOT.get((candidate, *_kind(scan, device)))
        )
        if reason is None:
            if device.type == "cuda":
                _say_once(candidate, scan.codec, "; ".join(passed_over))
            return candidate
        passed_over.append(f"no {candidate}: {reason}")
    raise AssertionError("PyAV is always there and refuses nothing")


_SAYING = threading.Lock()
_SAID: set[tuple[str, str, str]] = set()
# Which kinds of files a decoder has read, and why it does not read others: that depends on the GPU and its driver.
# NVDEC of an H100 has no AV1, every codec has a least and a largest size, and a container may lack the library.
_CAN: set[tuple[str, ...]] = set()
_CANNOT: dict[tuple[str, ...], str] = {}


def _kind(scan: ffmpeg.Scan, device: torch.device) -> tuple[str, ...]:
    least, most = sorted((scan.width, scan.height))
    size = "small" if least < SMALL else "large" if most > LARGE else "usual"
    return str(device), scan.codec, scan.pixel_format, size


def by_name(name: str, scan: ffmpeg.Scan, device: torch.device, attempt: Callable[[str], Tensor]) -> Tensor:
    """Decode by the decoder that `name` stands for. Where "auto" took another than PyAV and that fails, PyAV decides.

    A file that PyAV can decode is not bad. If the other has not read any of its kind yet, PyAV gets all of that kind.

    Args:
        name: "auto" or one of the table.
        scan: The file.
        device: Where the frames end up.
        attempt: Decodes by the decoder of that name.

    Raises:
        VideoError: The file is bad.
        UsageError: As in `choose`.
    """
    chosen = choose(name, scan, device)
    kind = chosen, *_kind(scan, device)
    try:
        frames = attempt(chosen)
    except RlaifFastError as error:
        if name != "auto" or chosen == "pyav":
            raise
        frames = attempt("pyav")
        if kind not in _CAN:
            _CANNOT[kind] = error.reason if isinstance(error, VideoError) else str(error)
        return frames
    _CAN.add(kind)
    return frames


@cache
def _decoder_class(name: str) -> Any:
    return find("decoders", name, DECODERS, also=["auto"])


@cache
def _unavailable(name: str) -> str | None:
    return _decoder_class(name).unavailable()


def _say_once(name: str, codec: str, passed_over: str) -> None:
    """Log once per codec and reason what decodes it for a GPU, and why it is not DALI."""
    with _SAYING:
        if (name, codec, passed_over) not in _SAID:
            _SAID.add((name, codec, passed_over))
            log.info("video: %s is decoded by %s%s", codec, name, f" ({passed_over})" if passed_over else "")


# `cache` alone would let two threads make one each, and DALI's pipelines hold GPU memory. A decoder may make another.
_MAKING = threading.RLock()


def decoder(name: str, device: str = "cpu") -> VideoDecoder:
    """Return the process's one decoder of that name for that device."""
    with _MAKING:
        return _made(name, device)


@cache
def _made(name: str, device: str) -> VideoDecoder:
    return _decoder_class(name)(device)


def decode(
    path: str, indices: Sequence[int], *, decoder: str = "auto", device: torch.device | str = "cpu"
) -> Tensor:
    """Return the frames (F, H, W, 3) uint8 RGB at `indices`, upright, in their order.

    Args:
        path: The video file.
        indices: Frames by their place in presentation order; any order, repeats allowed.
        decoder: "auto" or a name of the table (`rlaif_fast.video.DECODERS`).
        device: Where the frames end up.

    Raises:
        VideoError: When the file is bad or one of the frames cannot be decoded whole.
        UsageError: When the decoder asked for cannot run.
    """
    path, place = str(path), numbered(torch.device(device))
    scan = scan_file(path)
    attempt = partial(decode_sized, path, indices, None, place)
    return used_here(by_name(decoder, scan, place, attempt))


def decode_sized(
    path: str, indices: Sequence[int], size: tuple[int, int] | None, device: torch.device, name: str
) -> Tensor:
    """The frames of a file by the decoder called `name`, resized to (height, width) where `size` is given.

    On a GPU that is done `beside` what it computes.
    """
    chosen = decoder(name, str(device))
    resized = getattr(chosen, "decode_resized", None)
    if resized is not None:
        return to_device(resized(path, indices, size), device)
    with beside(device):
        frames = chosen.decode(path, indices).to(device)
        return frames if size is None else resize_frames(frames, size)
