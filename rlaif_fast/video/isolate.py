"""Decoding in processes of its own, which can be stopped.

A thread that hangs inside FFmpeg (a network mount that went away, an endless loop on a hostile file) cannot
be ended from outside: it keeps its stack, its file and its frames for the rest of the run, and a crash there
ends the run. A process can be killed, and the kernel takes back all that it held. So each decoding process
works for one thread; when it misses its deadline or dies, it is killed and reaped, the file is bad, and the
next request starts a fresh one. Pixels come through anonymous shared memory (`memfd`), which needs no name,
no cleaning up and no room in /dev/shm.
"""

from __future__ import annotations

import math
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_fast.errors import RlaifFastError, refusal
from rlaif_fast.video.errors import VideoError
from rlaif_fast.video.ffmpeg import Scan

CHUNK_BYTES = 32 << 20  # of frames handed over at a time
START_SECONDS = 120.0
SLICE_SECONDS = 1.0


class _Patience:
    """A budget of seconds to wait, over several waits.

    The wait is cut into slices, and a slice counts for no more than its length: when this process is stopped
    (Ctrl-Z, a suspended machine), so is the decoding process, and the file is not to blame.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self, channel: Connection) -> None:
        """Return once there is something to read; raises `TimeoutError`."""
        ready = False
        while not ready:
            if self._left <= 0:
                raise TimeoutError
            begun, length = time.monotonic(), min(self._left, SLICE_SECONDS)
            ready = channel.poll(length)
            self._left -= min(time.monotonic() - begun, length)


class DecodeProcess:
    """One decoding process, started at the first request and again after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._memory = _anonymous_file()
        self._capacity = 0

    def scan(self, path: str, timeout: float | None) -> tuple[Scan, str]:
        """Return what `path` holds and its digest; raises `VideoError`, also when `timeout` seconds pass."""
        with self._guarded(path, timeout) as patience:
            self._send(("scan", path))
            _, facts, digest = self._answer(patience)
            return Scan(**facts), digest

    def frames(
        self, path: str, scan: Scan, indices: Sequence[int], timeout: float | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, frame (H, W, 3) uint8), ascending; valid until the next one."""
        height, width = scan.shape
        frame_bytes = height * width * 3
        with self._guarded(path, timeout) as patience:
            self._grow(max(CHUNK_BYTES, frame_bytes))
            self._send(("frames", path, vars(scan), list(indices), self._capacity))
            memory = mmap.mmap(self._memory, self._capacity)  # unmapped when its last view is gone
            slots = self._capacity // frame_bytes
            room = np.frombuffer(memory, np.uint8, slots * frame_bytes).reshape(slots, height, width, 3)
            while (answer := self._answer(patience))[0] == "frames":
                for slot, index in enumerate(answer[1]):
                    yield index, room[slot]
                self._send(("next",))

    def close(self) -> None:
        """End the process and give the shared memory back."""
        self._kill()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    @property
    def pid(self) -> int | None:
        """The process's id; None while none runs."""
        return self._process.pid if self._process is not None else None

    @contextmanager
    def _guarded(self, path: str, timeout: float | None) -> Iterator[_Patience]:
        """Start the process if need be; kill it unless the body ends with an answer."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        whole = False
        try:
            yield _Patience(math.inf if timeout is None else timeout)
            whole = True
        except _Refused as error:
            whole = True
            raise VideoError(path, str(error)) from None
        except TimeoutError:
            raise VideoError(path, f"decoding took longer than {timeout:g} s") from None
        except (EOFError, OSError):
            raise VideoError(path, f"the decoder crashed on it ({self._exit_words()})") from None
        finally:
            if not whole:
                self._kill()

    def _start(self) -> None:
        self._kill()
        ours, theirs = Pipe()
        worker = str(Path(__file__).with_name("worker.py"))
        try:
            with _signals_for_the_group_blocked():
                self._process = subprocess.Popen(
                    [sys.executable, worker, str(theirs.fileno()), str(self._memory)],
                    pass_fds=(theirs.fileno(), self._memory),
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
        except OSError as error:
            ours.close()
            raise RlaifFastError(f"no decoding process could be started: {error.strerror}") from None
        finally:
            theirs.close()
        self._channel = ours
        try:
            self._answer(_Patience(START_SECONDS))  # importing FFmpeg is not the file's fault
        except (EOFError, OSError):
            self._kill()
            raise RlaifFastError("the decoding process did not start; its error is above") from None

    def _kill(self) -> None:
        # The end of the process wakes a thread that waits for an answer, so the channel is closed after it.
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if process is not None:
            process.kill()
            process.wait()
        if channel is not None:
            channel.close()

    def _exit_words(self) -> str:
        if self._process is None:
            return "it was stopped"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it stopped answering"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _grow(self, capacity: int) -> None:
        if capacity == self._capacity:
            return
        try:
            os.ftruncate(self._memory, capacity)
        except OSError as error:  # not the file's fault
            raise RlaifFastError(
                f"no memory for decoded frames ({capacity:,} bytes): {refusal(error)}"
            ) from error
        self._capacity = capacity

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._channel is None:
            raise EOFError
        self._channel.send(message)

    def _answer(self, patience: _Patience) -> tuple[Any, ...]:
        channel = self._channel
        if channel is None:
            raise EOFError
        patience.wait(channel)
        answer = channel.recv()
        if answer[0] == "bad":
            raise _Refused(answer[1])
        return answer


class DecodePool:
    """Decoding processes lent to threads, at most `size` at a time."""

    def __init__(self, size: int) -> None:
        self._all = [DecodeProcess() for _ in range(size)]
        self._free: queue.SimpleQueue[DecodeProcess] = queue.SimpleQueue()
        self._closed = threading.Event()
        for process in self._all:
            self._free.put(process)

    @contextmanager
    def lend(self) -> Iterator[DecodeProcess]:
        """Wait for a free process and hold it."""
        process = self._free.get()
        try:
            yield process
        finally:
            if self._closed.is_set():
                process.close()
            self._free.put(process)

    def close(self) -> None:
        """End every process; one that is lent ends when it comes back."""
        self._closed.set()
        lent = len(self._all)
        while True:
            try:
                self._free.get_nowait().close()
                lent -= 1
            except queue.Empty:
                break
        if lent:
            for process in self._all:
                process._kill()  # ends the wait of the thread that holds it

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [p.pid for p in self._all if p.pid is not None]


class _Refused(Exception):
    """The process answered that the file is bad."""


@contextmanager
def _signals_for_the_group_blocked() -> Iterator[None]:
    """Processes started here never see SIGINT, SIGTERM and SIGHUP, which terminals and schedulers send to whole groups.

    Otherwise a file would count as bad because a signal ended its process. The process ends when the channel closes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rlaif_fast_frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
