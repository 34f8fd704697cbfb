"""Cuts consecutive items into parts that fit a limit."""

from __future__ import annotations

from collections.abc import Sequence


def cut(sizes: Sequence[int], limit: int, joined_sizes: Sequence[int] | None = None) -> list[slice]:
    """Cut consecutive items into parts of at most `limit` in total; a larger item is a part of its own.

    Args:
        sizes: Size of each item when it comes first in a part.
        limit: Largest total of a part.
        joined_sizes: Size of each item when it follows another one in its part, if different; the first is unused.

    Returns:
        The slice of items of each part, in order.
    """
    parts: list[slice] = []
    used = 0
    for index, size in enumerate(sizes):
        joined = size if joined_sizes is None else joined_sizes[index]
        if parts and used + joined <= limit:
            parts[-1] = slice(parts[-1].start, index + 1)
            used += joined
        else:
            parts.append(slice(index, index + 1))
            used = size
    return parts
