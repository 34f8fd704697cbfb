"""SHA-256 of files and texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 2**20


def file_digest(path: Path, length: int | None = None) -> str:
    """SHA-256 of a file, or of its first `length` bytes; of all there is where it is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size if length is None else length
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
