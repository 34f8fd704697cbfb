"""Which files are the same media, and which rows are the same: by content, not by how their paths are spelled."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rlaif_fast.data.schema import Example
from rlaif_fast.digests import sampled_digest
from rlaif_fast.video.refs import MediaRef

_BLOCK = 1 << 20
_WHOLE = 64 << 20  # bytes; a larger file is compared only by its size, its first and its last block
_READERS = 16  # threads: a network file system mostly waits
_PART = 64  # files that a thread takes at a time

Names = Mapping[tuple[str, ...], frozenset[str]]  # names of media, by their files
T = TypeVar("T")
R = TypeVar("R")


def contents(rows: Iterable[Example]) -> Names:
    """Names for the content of all media of some rows, by their files; copies and links of one file share a name.

    Only files of equal size can be copies, so only those are read. A video given as frames has one name for all its
    frames together besides the names of the files: two videos whose first frame is black are two videos.
    """
    media = {files_of(medium): bool(medium.frames) for row in rows for medium in row.seen}
    paths = list({path for files in media for path in files})
    real = dict(zip(paths, _in_threads(_real_and_size, paths)))
    sizes = dict(real.values())
    shared = Counter(size for size in sizes.values() if size is not None)
    twins = [(name, size) for name, size in sizes.items() if size is not None and shared[size] > 1]
    digests = dict(zip((name for name, _ in twins), _in_threads(_digest, twins)))

    def names_of(files: tuple[str, ...], are_frames: bool) -> frozenset[str]:
        places = [real[path][0] for path in files]
        held = sorted({digests.get(place, place) for place in places})
        if are_frames:
            held = [
                hashlib.blake2b("\0".join(held).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
            ]
        return frozenset(places + held)

    return {files: names_of(files, are_frames) for files, are_frames in media.items()}


def digest_of_rows(rows: Sequence[Example]) -> str:
    """The number of rows and a digest of what they ask and show, in their order; folder names do not count.

    The content of their files is left to `digests_of_media`, and metadata to `digest_of_metadata`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        text = (row.id, row.question, row.answer, row.options, row.category)
        turns = (row.system, row.layout, row.asked, row.target)
        shown = [
            (
                [Path(file).name for file in files_of(medium)],
                medium.is_image,
                sorted(medium.cut.given().items()),
            )
            for medium in row.seen
        ]
        digest.update(repr((text, turns, shown)).encode("utf-8", "surrogatepass"))
    return f"{len(rows)} rows, {digest.hexdigest()}"


def digest_of_metadata(rows: Sequence[Example]) -> str:
    """A digest of the metadata of rows, in their order; oracles may read it."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row.metadata, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def digests_of_media(splits: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    """For each split a digest of the contents of the files that its rows show, in their order.

    Each file is read once, however many rows show it. Only its size and four blocks of 16 KiB count, the first and
    the last among them, since a dataset may have a hundred thousand videos; for a file up to 64 KiB all bytes count.
    """
    paths = {
        split: [path for row in rows for medium in row.seen for path in files_of(medium)]
        for split, rows in splits.items()
    }
    distinct = sorted({path for shown in paths.values() for path in shown})
    prints = dict(zip(distinct, _in_threads(_print, distinct)))
    return {
        split: hashlib.blake2b("\n".join(prints[path] for path in shown).encode(), digest_size=16).hexdigest()
        for split, shown in paths.items()
    }


def files_of(medium: MediaRef) -> tuple[str, ...]:
    """The files that a medium is read from."""
    return medium.frames or (medium.path,)


def media_of(rows: Iterable[Example], names: Names) -> set[str]:
    """The contents that rows are about, as `contents` names them; for a row without media, what it asks."""
    found: set[str] = set()
    for row in rows:
        for medium in row.seen:
            found |= names[files_of(medium)]
        if not row.seen:
            found.add(repr(("asked", row.question, row.options)))
    return found


def group_by_content(rows: Sequence[Example], names: Names) -> list[list[Example]]:
    """Rows grouped if they share any media, in order of first appearance; rows without media by what they ask.

    Args:
        rows: The rows.
        names: Their `contents`.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    own = [sorted(media_of([row], names)) for row in rows]
    for media in own:
        for name in media[1:]:
            parent[root(name)] = root(media[0])
    groups: dict[str, list[Example]] = {}
    for row, media in zip(rows, own):
        groups.setdefault(root(media[0]), []).append(row)
    return list(groups.values())


def _print(path: str) -> str:
    try:
        return sampled_digest(Path(path), blocks=4, block=2**14)
    except (OSError, ValueError):
        return "unreadable"  # decoding will say why


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results, in order, of a function that waits for files."""
    parts = [items[start : start + _PART] for start in range(0, len(items), _PART)]
    with ThreadPoolExecutor(_READERS) as pool:
        return [found for part in pool.map(lambda part: list(map(function, part)), parts) for found in part]


def _real_and_size(path: str) -> tuple[str, int | None]:
    """The real path of a file and its size in bytes; None if it is not a file."""
    try:
        facts = os.stat(path)  # noqa: PTH116  parsing a hundred thousand paths would be slow
        size = facts.st_size if stat.S_ISREG(facts.st_mode) else None
    except (OSError, ValueError):
        size = None
    return os.path.realpath(path), size


def _digest(twin: tuple[str, int]) -> str:
    path, size = twin
    found = hashlib.blake2b(str(size).encode(), digest_size=20)
    try:
        with Path(path).open("rb") as file:
            if size <= _WHOLE:
                while block := file.read(_BLOCK):
                    found.update(block)
            else:
                found.update(file.read(_BLOCK))
                file.seek(size - _BLOCK)
                found.update(file.read(_BLOCK))
    except OSError:
        return path
    return f"content:{found.hexdigest()}"
