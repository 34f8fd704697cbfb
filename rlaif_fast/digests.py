"""Digests of files and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 2**20


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    size = path.stat().st_size
    return beginning_digests(path, [size])[size]


def beginning_digests(path: Path, lengths: Iterable[int]) -> dict[int, str]:
    """SHA-256 of the first bytes of a file, by their number; of the whole file if it is shorter. It is read once."""
    digest, done, found = hashlib.sha256(), 0, {}
    with path.open("rb") as file:
        for length in sorted(lengths):
            while done < length and (block := file.read(min(BLOCK, length - done))):
                digest.update(block)
                done += len(block)
            found[length] = digest.hexdigest()
    return found


def sampled_digest(path: Path, blocks: int, block: int) -> str:
    """A digest of a file's size and of blocks spread evenly over it, including the first and the last.

    It tells apart files of the same name, however large they are. A file no larger than the blocks together is read
    whole.

    Args:
        path: The file.
        blocks: Number of blocks to read, at least 2.
        block: Bytes of each.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= blocks * block:
        digest.update(file_digest(path).encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek((size - block) * number // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
