"""A folder with one file per split, and how the splits are kept apart."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rlaif_fast.data.identity import Names, media_of
from rlaif_fast.data.schema import Example
from rlaif_fast.data.sources import TABLES
from rlaif_fast.errors import UsageError

SPLITS = ("sft", "rl", "validation", "test")


def files_of_splits(folder: Path, elsewhere: Collection[str] = ()) -> dict[str, Path]:
    """The file of each split that a folder holds.

    Args:
        folder: Where they are.
        elsewhere: Splits that are read from another place.

    Raises:
        UsageError: A file is named after a split but would not be read.
    """
    found = {split: path for split in SPLITS if (path := folder / f"{split}.jsonl").exists()}
    for name, split in (*zip(SPLITS, SPLITS), ("val", "validation"), ("valid", "validation")):
        if split in found or split in elsewhere:
            continue
        for suffix in (".jsonl", *TABLES):
            if (file := folder / f"{name}{suffix}").exists():
                key = "data" if split == "rl" else f"{split}_data"
                raise UsageError(
                    f"data: {file} would not be read; give it as {key}, or name it {split}.jsonl if it is one"
                )
    return found


def is_one_table(folder: Path) -> bool:
    """Whether a folder is one dataset, saved by `datasets` or as parquet files, rather than one file per split."""
    if not folder.is_dir() or any(folder.glob("*.jsonl")):
        return False
    if any(folder.glob("*.parquet")) and any((folder / f"{split}.parquet").exists() for split in SPLITS):
        return False
    marks = ("state.json", "dataset_dict.json", "*.parquet", "*/*.parquet")
    return any(file for mark in marks for file in folder.glob(mark))


def rows_apart(rows: Sequence[Example], others: Sequence[Example], names: Names) -> list[Example]:
    """The rows that share no video, picture or question without media with the others.

    Args:
        rows: The rows.
        others: What they are kept apart from.
        names: The `contents` of all.
    """
    theirs = media_of(others, names)
    return [row for row in rows if media_of([row], names).isdisjoint(theirs)]
