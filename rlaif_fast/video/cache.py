"""Sampled frames kept by content: in memory first, then on disk, each within a byte budget."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import threading
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.recent import RecentlyUsed
from rlaif_fast.streams import beside
from rlaif_fast.video.base import Clip

MAGIC = b"RFCLIP1\n"
SUFFIX = ".clip"
STALE_SECONDS = 3600  # a temporary file older than this belongs to a process that was killed
_HEAD = struct.Struct("<8sI")  # magic, bytes of the JSON header that follows


class ClipCache:
    """Clips by key. Safe between threads, and on disk between processes.

    A clip on disk is one file: a JSON header and the raw frames, with a checksum over both. It is written
    under a temporary name and renamed, so a process killed half-way leaves nothing that looks like a clip. A
    file that is short or fails its checksum counts as absent and is deleted. The least recently used go
    first. A read-only folder is only read.

    What other processes write to a shared folder is noticed after this process has written an eighth of the
    budget.

    Args:
        memory_bytes: Budget in memory; 0 keeps nothing there.
        disk_dir: Folder on disk; None for none. It may be shared between runs and processes.
        disk_bytes: Budget on disk.
    """

    def __init__(
        self, memory_bytes: int = 512 << 20, disk_dir: str | Path | None = None, disk_bytes: int = 8 << 30
    ) -> None:
        self.disk_bytes = disk_bytes
        self.disk_dir = None if disk_dir is None else Path(disk_dir)
        self.memory_hits = self.disk_hits = self.misses = 0
        self._lock = threading.Lock()
        self._clips: RecentlyUsed[str, Clip] = RecentlyUsed(memory_bytes, lambda clip: clip.frames.nbytes)
        self._on_disk: OrderedDict[str, int] = OrderedDict()
        self._disk_held = self._unsurveyed = 0
        if self.disk_dir is not None:
            try:
                self.disk_dir.mkdir(parents=True, exist_ok=True)
                self._survey(self.disk_dir)
            except OSError as error:
                raise UsageError(f"the clip cache cannot use {self.disk_dir}: {error.strerror}") from None

    def get(self, key: str) -> Clip | None:
        """Return the clip of `key`, or None."""
        with self._lock:
            held = self._clips.get(key)
            if held is not None:
                self.memory_hits += 1
                return held
        clip = None if self.disk_dir is None else self._read(_file(self.disk_dir, key), key)
        with self._lock:
            if clip is None:
                self.misses += 1
            else:
                self.disk_hits += 1
        if clip is not None:
            self._keep(clip)
        return clip

    def put(self, clip: Clip) -> None:
        """Keep a clip under its key. A full or failing disk loses the copy there, nothing else."""
        self._keep(clip)
        if self.disk_dir is not None:
            self._write(self.disk_dir, clip)

    @property
    def held_bytes(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        return self._clips.held, self._disk_held

    def _keep(self, clip: Clip) -> None:
        with self._lock:
            self._clips.put(clip.key, clip)

    def _write(self, folder: Path, clip: Clip) -> None:
        with beside(clip.frames.device):
            frames = clip.frames.contiguous().cpu()
        target = _file(folder, clip.key)
        if frames.nbytes > self.disk_bytes or target.exists():
            return
        header = json.dumps(
            {
                "key": clip.key,
                "shape": list(frames.shape),
                "timestamps": list(clip.timestamps),
                "path": clip.path,
                "is_image": clip.is_image,
                "sample_fps": clip.sample_fps,
            }
        ).encode()
        pixels = frames.numpy().reshape(-1).data
        checksum = zlib.crc32(pixels, zlib.crc32(header))
        temporary = folder / f".{target.stem}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(_HEAD.pack(MAGIC, len(header)) + header + struct.pack("<I", checksum))
                file.write(pixels)
                size = file.tell()
            temporary.replace(target)
            self._account(folder, target.stem, size)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _read(self, file: Path, key: str) -> Clip | None:
        try:
            data = bytearray(file.read_bytes())
        except OSError:
            return None
        clip = _parse(data)
        whole = clip is not None and clip.key == key
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(file) if whole else file.unlink(missing_ok=True)
        if clip is None or not whole:
            return None
        with self._lock:
            if file.stem in self._on_disk:
                self._on_disk.move_to_end(file.stem)
        return clip

    def _account(self, folder: Path, name: str, size: int) -> None:
        with self._lock:
            self._disk_held += size - self._on_disk.pop(name, 0)
            self._on_disk[name] = size
            self._unsurveyed += size
            if max(self._disk_held, 8 * self._unsurveyed) <= self.disk_bytes:
                return
            self._survey(folder)  # other processes write here too
            while self._disk_held > self.disk_bytes:
                oldest, freed = self._on_disk.popitem(last=False)
                (folder / (oldest + SUFFIX)).unlink(missing_ok=True)
                self._disk_held -= freed

    def _survey(self, folder: Path) -> None:
        """Note what is on disk, least recently used first, and sweep up after killed processes."""
        found = []
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may delete it meanwhile
                facts = file.stat()
                if file.suffix == SUFFIX:
                    found.append((facts.st_mtime_ns, file.stem, facts.st_size))
                elif file.suffix == ".tmp" and time.time() - facts.st_mtime > STALE_SECONDS:
                    file.unlink()
        self._on_disk = OrderedDict((name, size) for _, name, size in sorted(found))
        self._disk_held, self._unsurveyed = sum(self._on_disk.values()), 0


def _file(folder: Path, key: str) -> Path:
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,128}", key):
        raise ValueError(f"key must be 1 to 128 letters, digits, '-' or '_', got {key!r}")
    return folder / (key + SUFFIX)


def _parse(data: bytearray) -> Clip | None:
    """Return the clip in `data`, whose frames share its memory; None when it is not whole."""
    if len(data) < _HEAD.size:
        return None
    magic, length = _HEAD.unpack_from(data)
    start = _HEAD.size + length + 4
    if magic != MAGIC or len(data) < start:
        return None
    view = memoryview(data)
    header, pixels = view[_HEAD.size : start - 4], view[start:]
    if zlib.crc32(pixels, zlib.crc32(header)) != struct.unpack("<I", view[start - 4 : start])[0]:
        return None
    facts = json.loads(bytes(header))
    frames = torch.frombuffer(data, dtype=torch.uint8, offset=start).view(facts["shape"])
    return Clip(
        frames,
        tuple(facts["timestamps"]),
        facts["key"],
        facts["path"],
        facts["is_image"],
        facts["sample_fps"],
    )
