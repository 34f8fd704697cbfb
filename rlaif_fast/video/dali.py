"""Decoding through one persistent DALI pipeline: NVDEC on a GPU; VP8, VP9 and MJPEG on the CPU too.

Any thread submits a file and gets a future. One thread gathers the submitted files into batches, of unequal sizes and
lengths, and runs the pipeline on DALI's own stream while the callers do something else; the frames are copied out of
DALI's memory, which it reuses in the order of that stream alone. A file that cannot be
decoded makes DALI fail the whole batch and spoils the pipeline, so the pipeline is built again and the files of that
batch go through it one by one: only the bad ones fail.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.streams import beside, no_captures, numbered
from rlaif_fast.video import ffmpeg
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.probe import scan_for
from rlaif_fast.video.scan import NOT_PLAIN

CPU_CODECS = ("vp8", "vp9", "mjpeg")
GPU_CODECS = (*CPU_CODECS, "av1", "mpeg4", "h264", "hevc")
BATCH_FILES = 8  # each file holds a decoder; DALI's own cache of NVDEC decoders has room for 100
BATCH_BYTES = 1 << 30  # of decoded frames
WAIT_SECONDS = 120.0
BT_601 = (0.299, 0.114)  # the colour matrix by which DALI reads every video
# Share of red and of blue in the brightness, by `Scan.colorspace`.
LUMA = {2: BT_601, 5: BT_601, 6: BT_601, 1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


@dataclass
class _Job:
    path: str
    data: np.ndarray
    indices: np.ndarray
    scan: ffmpeg.Scan
    result: Future[Tensor] = field(default_factory=Future)

    @property
    def output_bytes(self) -> int:
        return len(self.indices) * self.scan.width * self.scan.height * 3


class DaliDecoder:
    """The DALI pipeline of this process for one device.

    Args:
        device: "cpu", or a CUDA device for NVDEC.
        timeout: Seconds a file may take, from submission.
    """

    name = "dali"

    def __init__(self, device: torch.device | str = "cpu", timeout: float = WAIT_SECONDS) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise UsageError(f"decoder 'dali' cannot run here: {reason}")
        self.device = numbered(torch.device(device))
        self.timeout = timeout
        self.builds = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._left_over: _Job | None = None
        self._pipeline: Any = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @staticmethod
    def unavailable() -> str | None:
        """Return why DALI cannot run here, or None."""
        try:
            from nvidia.dali import fn
        except ImportError as error:
            return f"nvidia-dali does not import ({error})"
        return None if hasattr(fn.decoders, "video") else "this DALI has no fn.decoders.video; 2.0 has"

    @staticmethod
    def refuses(scan: ffmpeg.Scan, device: torch.device) -> str | None:
        """Return why DALI cannot read such a file on `device`, or None."""
        codecs = CPU_CODECS if device.type == "cpu" else GPU_CODECS
        if scan.codec not in codecs:
            return f"it does not decode {scan.codec} on {device.type}"
        if not scan.plain:
            return NOT_PLAIN
        if scan.mirrored:
            return "mirrored videos are left to FFmpeg"
        if scan.colorspace not in LUMA:
            return f"videos with the colour matrix {scan.colorspace} are left to FFmpeg"
        if device.type != "cpu" and "10" in scan.pixel_format:
            return f"{scan.pixel_format} is left to FFmpeg"
        return None

    def decode(self, path: str, indices: Sequence[int]) -> Tensor:
        """Return frames (F, H, W, 3) uint8 RGB on the device, upright, in the order of `indices`."""
        try:
            return self.submit(path, indices).result(self.timeout)
        except TimeoutError:
            raise VideoError(path, f"decoding took longer than {self.timeout:g} s") from None

    def submit(self, path: str, indices: Sequence[int]) -> Future[Tensor]:
        """Read the file, queue it for the next batch and return the future of its frames."""
        scan = scan_for(self, path, indices)
        if not len(indices):
            nothing: Future[Tensor] = Future()
            nothing.set_result(torch.empty(0, *scan.shape, 3, dtype=torch.uint8, device=self.device))
            return nothing
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise VideoError(path, f"cannot be read: {error.strerror}") from None
        job = _Job(path, data, np.asarray(indices, np.int32), scan)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="dali", daemon=True)
                self._thread.start()
        self._jobs.put(job)
        return job.result

    def close(self) -> None:
        """End the thread and give the pipeline's memory back."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def _work(self) -> None:
        while (batch := self._gather()) is not None:
            with self._free_to_synchronise():
                self._answer(batch)
        with self._free_to_synchronise():
            self._pipeline = None

    def _free_to_synchronise(self) -> AbstractContextManager[None]:
        return no_captures() if self.device.type == "cuda" else nullcontext()

    def _answer(self, batch: list[_Job]) -> None:
        try:
            self._serve(batch)
        except Exception as error:  # such as out of memory: not the files' fault, and the thread goes on
            self._pipeline = None
            for job in batch:
                if not job.result.done():
                    job.result.set_exception(error)

    def _serve(self, batch: list[_Job]) -> None:
        if self._pipeline is None:
            try:
                self._pipeline = self._build()
            except RuntimeError as error:
                for job in batch:
                    job.result.set_exception(RlaifFastError(f"DALI does not start: {_told(error)}"))
                return
        try:
            frames = self._run(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._pipeline = None  # a failed pipeline cannot be used again
            if len(batch) == 1:
                reason = f"DALI cannot decode it: {_told(error)}"
                batch[0].result.set_exception(VideoError(batch[0].path, reason))
            else:
                for job in batch:
                    self._serve([job])
        else:
            for job, decoded in zip(batch, frames, strict=True):
                _settle(job, decoded)

    def _gather(self) -> list[_Job] | None:
        """Wait for a job, and add the others that are waiting, within the limits; None at the end."""
        first = self._left_over or self._jobs.get()
        self._left_over = None
        if first is None:
            return None
        batch, size = [first], first.output_bytes
        while len(batch) < BATCH_FILES:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            size += job.output_bytes
            if size > BATCH_BYTES:
                self._left_over = job
                break
            batch.append(job)
        return batch

    def _run(self, batch: list[_Job]) -> list[Tensor]:
        self._pipeline.feed_input("encoded", [job.data for job in batch])
        self._pipeline.feed_input("indices", [job.indices for job in batch])
        (output,) = self._pipeline.run()
        with beside(self.device):  # `output` holds DALI's memory until the copies are whole
            decoded = [torch.from_dlpack(output[i]) for i in range(len(batch))]
            turns = [-(job.scan.rotation // 90) for job in batch]
            upright = [torch.rot90(x, k, (1, 2)) for x, k in zip(decoded, turns)]  # a copy where k is 0, too
            for job, frames in zip(batch, upright):
                _recolour(frames, LUMA[job.scan.colorspace])
            return upright

    def _build(self) -> Any:
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
        from nvidia.dali.types import DALIDataType

        self.builds += 1
        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=BATCH_FILES,
            num_threads=min(os.cpu_count() or 1, BATCH_FILES),
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,  # this class's own queue is what runs ahead
            exec_dynamic=True,  # outputs stay valid as long as a tensor refers to them
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1, no_copy=True)
            indices = fn.external_source(name="indices", dtype=DALIDataType.INT32, ndim=1)
            place = "mixed" if on_gpu else "cpu"
            # The default pad_mode returns a black frame for one that does not exist.
            pipeline.set_outputs(fn.decoders.video(encoded, frames=indices, device=place, pad_mode="none"))
        pipeline.build()
        return pipeline


def _recolour(frames: Tensor, luma: tuple[float, float]) -> None:
    """Give frames (F, H, W, 3) that were read by BT.601 the colours of their own matrix, in place.

    A colour that BT.601 put outside 0 to 255 was clipped, so it only comes near its true value.
    """
    if luma == BT_601:
        return
    change = (_rgb_of(luma) @ _rgb_of(BT_601).inverse()).T.to(frames.device, torch.float32)
    for frame in frames:  # one at a time: it takes eight times its memory
        frame.copy_((frame.float() @ change).round_().clamp_(0, 255))


def _rgb_of(luma: tuple[float, float]) -> Tensor:
    """The matrix to red, green and blue (rows) from brightness and the differences to blue and red (columns)."""
    red, blue = luma
    green, to_blue, to_red = 1 - red - blue, 2 * (1 - blue), 2 * (1 - red)
    rows = [[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]]
    return torch.tensor(rows, dtype=torch.float64)


def _settle(job: _Job, decoded: Tensor) -> None:
    wanted = (len(job.indices), *job.scan.shape, 3)
    if tuple(decoded.shape) == wanted:
        job.result.set_result(decoded)
    else:
        got = "x".join(map(str, decoded.shape))
        job.result.set_exception(VideoError(job.path, f"DALI gave frames of {got}, not {wanted}"))


def _told(error: RuntimeError) -> str:
    """Return the line of DALI's report that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if re.search("assert|failed|error", line, re.IGNORECASE)]
    line = next((x for x in told if not x.startswith(("Critical error", "Error in"))), "no reason given")
    return line[:200]
