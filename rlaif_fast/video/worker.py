"""The decoding process: answers requests on a socket, leaves pixels in shared memory. Run by path, never
imported.

It loads `ffmpeg.py` as a lone file: importing the package would import torch, which costs seconds and 200 MB
a process.
"""

from __future__ import annotations

import importlib.util
import mmap
import pickle
import socket
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HEADER = struct.Struct("<Q")


def main(socket_fd: int, memory_fd: int) -> None:
    """Serve until the other end closes."""
    ffmpeg = _load_ffmpeg()
    with socket.socket(fileno=socket_fd) as channel:
        _send(channel, ("ready",))
        while (request := _receive(channel)) is not None:
            try:
                _serve(ffmpeg, channel, memory_fd, *request)
            except ffmpeg.BadVideo as error:
                _send(channel, ("bad", str(error)))
            except MemoryError:
                _send(channel, ("bad", "not enough memory to decode it"))
            except (ConnectionError, EOFError):
                return  # the other end is gone
            except Exception as error:  # whatever a decoder raises is the file's fault
                _send(channel, ("bad", f"cannot be decoded: {type(error).__name__}: {error}"))


def _serve(ffmpeg: Any, channel: socket.socket, memory_fd: int, kind: str, path: str, *rest: Any) -> None:
    if kind == "scan":
        _send(channel, ("scan", asdict(ffmpeg.scan(path)), ffmpeg.digest(path)))
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
    _send(channel, ("done",))


def _hand_over(channel: socket.socket, held: list[int]) -> None:
    _send(channel, ("frames", held))
    if _receive(channel) is None:
        sys.exit(0)


def _load_ffmpeg() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rlaif_fast_ffmpeg", Path(__file__).with_name("ffmpeg.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _send(channel: socket.socket, message: tuple[Any, ...]) -> None:
    data = pickle.dumps(message)
    channel.sendall(HEADER.pack(len(data)) + data)


def _receive(channel: socket.socket) -> Any:
    head = _exactly(channel, HEADER.size)
    if head is None:
        return None
    body = _exactly(channel, HEADER.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    sys.path.pop(0)  # the package's folder; its file names must not stand in for libraries
    main(int(sys.argv[1]), int(sys.argv[2]))
