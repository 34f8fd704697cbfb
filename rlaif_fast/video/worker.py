"""The decoding process: answers requests on a socket, leaves pixels in shared memory. Run by path, never
imported.

It loads `ffmpeg.py` without what the packages around it import: torch would cost seconds and 200 MB a process.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def main(socket_fd: int, memory_fd: int) -> None:
    """Serve until the other end closes or is killed; data that it did not read then resets the socket."""
    ffmpeg = _load("ffmpeg")
    with contextlib.suppress(EOFError, ConnectionError), Connection(socket_fd) as channel:
        channel.send(("ready",))
        while True:
            request = channel.recv()
            try:
                _serve(ffmpeg, channel, memory_fd, *request)
            except ffmpeg.BadVideo as error:
                channel.send(("bad", str(error)))
            except MemoryError:
                channel.send(("bad", "not enough memory to decode it"))
            except (ConnectionError, EOFError):
                return
            except Exception as error:  # whatever a decoder raises is the file's fault
                channel.send(("bad", f"cannot be decoded: {type(error).__name__}: {error}"))


def _serve(ffmpeg: Any, channel: Connection, memory_fd: int, kind: str, path: str, *rest: Any) -> None:
    if kind == "scan":
        channel.send(("scan", vars(ffmpeg.scan(path)), _load("container").digest(path)))
        return
    facts, indices, capacity = rest
    info = ffmpeg.Scan(**facts)
    height, width = info.shape
    slots = capacity // (height * width * 3)
    with mmap.mmap(memory_fd, capacity) as memory:
        room = np.frombuffer(memory, np.uint8, slots * height * width * 3).reshape(slots, height, width, 3)
        held: list[int] = []
        try:
            for index, picture in ffmpeg.read_frames(path, info, indices):
                room[len(held)] = picture
                held.append(index)
                if len(held) == slots:
                    _hand_over(channel, held)
                    held = []
            if held:
                _hand_over(channel, held)
        finally:
            del room  # a live view would keep the mapping open
    channel.send(("done",))


def _hand_over(channel: Connection, held: list[int]) -> None:
    channel.send(("frames", held))
    channel.recv()


def _load(module: str) -> Any:
    """Import a module of `rlaif_fast.video` without running the `__init__.py` of the packages around it."""
    folder = Path(__file__).resolve().parent
    for name, path in (("rlaif_fast", folder.parent), ("rlaif_fast.video", folder)):
        if name not in sys.modules:
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(path)]
    return importlib.import_module(f"rlaif_fast.video.{module}")


if __name__ == "__main__":
    sys.path.pop(0)  # the package's folder; its file names must not stand in for libraries
    main(int(sys.argv[1]), int(sys.argv[2]))
