"""Consecutive items in parts that fit a limit."""

from __future__ import annotations

from collections.abc import Sequence


def cut(sizes: Sequence[int], limit: int, joined_sizes: Sequence[int] | None = None) -> list[slice]:
    """Cut consecutive items into parts of at most `limit` together; a larger item is a part of its own.

    Args:
        sizes: Size of each item at the beginning of a part.
        limit: Most that a part may hold.
        joined_sizes: Size of each item behind another one of its part, where it is not the same; the first is unused.

    Returns:
        Where each part's items are, part after part.
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
