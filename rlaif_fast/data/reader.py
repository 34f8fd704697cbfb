"""Reads datasets; a wrong row is reported with its file and line."""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlaif_fast.data.converters import FORMATS, TEXT_KEYS, Fields, convert
from rlaif_fast.data.errors import RowError
from rlaif_fast.data.media_keys import MEDIA_KEYS, PICTURE_SUFFIXES, VIDEO_SUFFIXES, Medium, cut_key_like
from rlaif_fast.data.published import youtube_names
from rlaif_fast.data.schema import NO_CATEGORY, Example
from rlaif_fast.data.sources import read_text, rows_of
from rlaif_fast.errors import UsageError, printable, require
from rlaif_fast.video.refs import Cut, MediaRef

logger = logging.getLogger(__name__)

# where published datasets unpack to
VIDEO_FOLDERS = tuple(
    map(Path, ("", "videos", "video", "data", "YouTubeClips", "videos/all", "all_test", "mp4"))
)
_SHOWN = 10  # most wrong rows that a message names


@dataclass
class ReadReport:
    """Result of reading a file.

    Attributes:
        path: The file.
        examples: The usable rows, in order.
        rows: Number of rows, wrong ones included.
        errors: One "file:line: why" for each wrong row.
        notes: What the user may want to know, though nothing is wrong.
        formats: Rows by format.
    """

    path: Path
    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    def describe_errors(self, shown: int = _SHOWN) -> str:
        """A message that counts the wrong rows and names the first of them."""
        lines = [f"{self.path}: {len(self.errors)} of {self.rows} rows are wrong", *self.errors[:shown]]
        if len(self.errors) > shown:
            lines.append(f"... and {len(self.errors) - shown} more")
        return "\n  ".join(lines)


def read_examples(
    path: str | Path,
    *,
    media_root: str | Path | None = None,
    require_answer: bool = True,
    check_files: bool = True,
    scored: Literal["answer", "whole"] = "answer",
    on_error: Literal["raise", "skip"] = "raise",
) -> list[Example]:
    """Read a dataset in any of the formats of `converters`, detected per row.

    Args:
        path: A file with one JSON object per line, or with one JSON array; a CSV or parquet file; a `datasets` folder.
        media_root: Folder that relative paths start from; by default the folder of `path`.
        require_answer: Whether a row without an answer is wrong.
        check_files: Whether a row whose video or image is missing is wrong.
        scored: Which part of an answer with `<think>` or `<answer>` blocks is scored: only the last
            `<answer>` block, or the whole; supervised fine-tuning teaches the whole.
        on_error: "raise" refuses a file with wrong rows and names them; "skip" leaves them out and logs them.

    Raises:
        UsageError: The file cannot be read, has no usable row, or has wrong rows and `on_error` is "raise"; or `scored`
            or `on_error` has an unknown value.
    """
    require(on_error in ("raise", "skip"), "on_error", "raise or skip", on_error)
    report = read_report(
        path, media_root=media_root, require_answer=require_answer, check_files=check_files, scored=scored
    )
    if report.errors and on_error == "raise":
        raise UsageError(report.describe_errors())
    if report.errors:
        logger.warning("%s", report.describe_errors())
    if not report.examples:
        raise UsageError(
            f"{report.path}: no usable row; {report.errors[0] if report.errors else 'the file is empty'}"
        )
    for note in report.notes:
        logger.info("%s: %s", report.path, note)
    return report.examples


def read_report(
    path: str | Path,
    *,
    media_root: str | Path | None = None,
    require_answer: bool = True,
    check_files: bool = True,
    scored: Literal["answer", "whole"] = "answer",
) -> ReadReport:
    """Read a dataset as `read_examples` does, but return a full report.

    Raises:
        UsageError: The file itself cannot be read, or `scored` has an unknown value.
    """
    require(scored in ("answer", "whole"), "scored", "answer or whole", scored)
    path = Path(path).expanduser()
    root = path.parent if media_root is None else Path(media_root).expanduser()
    report = ReadReport(path)
    lines_of: dict[str, int] = {}  # id -> line
    renamed = uncategorised = 0
    unread: Counter[str] = Counter()  # keys that do not cut a video, though they are called so
    asked_twice: Counter[tuple[str, str]] = Counter()  # the key that is read as the question, and another
    media = MediaFiles(root, check_files)
    for line, row in rows_of(path):
        report.rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, dict):
                raise RowError(f"expected a JSON object, got {type(row).__name__}")
            name, found = convert(row, scored)
            examples = []
            refuse_mistyped_media(row, found)
            for turn, fields in enumerate(found):
                if require_answer and fields.answer is None:
                    raise RowError(_no_answer(row))
                id_ = fields.id or f"{path.stem}:{line}"
                id_ += f"#{turn + 1}" if len(found) > 1 else ""
                if id_ in lines_of and name == "native" and fields.id is not None:
                    raise RowError(f"id {id_!r} is that of line {lines_of[id_]} too; ids must be unique")
                if id_ in lines_of:
                    # a JSON array may have all its rows on one line
                    names = (f"{id_}@{line}", f"{id_}@{line}.{report.rows}")
                    id_, renamed = next(new for new in names if new not in lines_of), renamed + 1
                examples.append(_example(fields, id_, media, f"{path}:{line}"))
        except RowError as error:
            report.errors.append(printable(f"{path}:{line}: {error}"))
            continue
        except UsageError:  # from a file beside this one: not this row's fault
            raise
        except Exception as error:  # no row may end a run; an unforeseen error is reported like the others
            report.errors.append(
                printable(f"{path}:{line}: cannot be read ({type(error).__name__}: {error})")
            )
            continue
        lines_of.update((example.id, line) for example in examples)
        uncategorised += sum(fields.category is None for fields in found)
        report.examples += examples
        report.formats[name] += 1
        read, *others = (key for key in FORMATS if row.get(key) is not None)
        asked_twice.update((read, key) for key in others)
        if any(example.seen for example in examples):
            unread.update(key for key in row if cut_key_like(key) and row[key] is not None)
    if uncategorised:
        report.notes.append(f"{uncategorised} questions have no category")
    if renamed:
        report.notes.append(f"{renamed} questions share their id with another; their line was added to it")
    report.notes += [
        f"{count} rows have {read!r} and {other!r}; only {read!r} is read"
        for (read, other), count in asked_twice.items()
    ]
    report.notes += [
        f"{count} rows about media have {key!r}, which is metadata alone; did you mean {cut_key_like(key)!r}?"
        for key, count in unread.items()
    ]
    if media_root is not None and not media.root_read and not report.errors:
        report.notes.append(f"media_root ({root}) is not read, since no path is relative")
    return report


class MediaFiles:
    """Resolves the paths of rows, and looks at each file only once.

    Args:
        root: Folder that relative paths start from.
        check: Whether each file must exist and be readable.
    """

    def __init__(self, root: Path, check: bool) -> None:
        self.root = root
        self.check = check
        self.root_read = False  # whether a path was relative
        self.seen: dict[str, str] = {}  # path -> what is wrong with it
        self.folders: dict[Path, tuple[str, ...]] = {}  # folder -> the pictures in it

    def find(self, names: Sequence[str]) -> str:
        """The video of the first name that exists, in the folder or where published datasets keep them."""
        known = [each for name in names for each in (self._youtube.get(name), name) if each]
        tried = [
            folder / f"{name}{suffix}"
            for name in known
            for folder in VIDEO_FOLDERS
            for suffix in (("",) if name.casefold().endswith(VIDEO_SUFFIXES) else VIDEO_SUFFIXES)
        ]
        for name in tried:
            if (self.root / name).exists():
                return str(name)
        return str(tried[0])

    @cached_property
    def _youtube(self) -> dict[str, str]:
        """The names of MSVD's files, by the numbers in its rows."""
        file = self.root / "youtube_mapping.txt"
        return youtube_names(read_text(file)) if file.is_file() else {}

    def resolve(self, medium: Medium) -> MediaRef:
        """The medium with its full path.

        Raises:
            RowError: There is no such file, or it cannot be read.
        """
        try:
            return self._resolve(medium)
        except OSError as error:  # a name that no file system takes, a folder that may not be listed
            raise RowError(f"{error.filename or medium.path} cannot be read: {error.strerror}") from None

    def _resolve(self, medium: Medium) -> MediaRef:
        if medium.names:
            medium = replace(medium, path=self.find(medium.names))
        names = medium.frames or (medium.path,)
        paths = tuple(str(self.root / name) for name in names)
        self.root_read |= not all(map(os.path.isabs, names))
        if not medium.frames and medium.kind == "video" and Path(paths[0]).is_dir():
            return MediaRef(paths[0], False, medium.cut, self._folder(Path(paths[0])))
        for path in paths if self.check else ():
            if path not in self.seen:
                self.seen[path] = self._trouble(Path(path))
            if self.seen[path]:
                raise RowError(self.seen[path])
        return MediaRef(paths[0], medium.kind == "image", medium.cut, paths if medium.frames else ())

    def _folder(self, path: Path) -> tuple[str, ...]:
        """The pictures of a folder that represents a video."""
        if path not in self.folders:
            self.folders[path] = pictures_in(path)
        if not self.folders[path]:
            raise RowError(f"{path} is a folder without pictures; give a video file, or a folder of frames")
        return self.folders[path]

    @staticmethod
    def _trouble(path: Path) -> str:
        try:
            if path.is_dir() and any(path.iterdir()):
                return f"{path} is a folder; give the path of a file"
            if path.stat().st_size == 0:
                return f"{path} is empty"
            with path.open("rb"):
                return ""
        except FileNotFoundError:
            for form in ("NFC", "NFD"):
                if Path(unicodedata.normalize(form, str(path))).exists():
                    return f"{path} does not exist, but the same name in the Unicode form {form} does; rename the file"
            return f"{path} does not exist; relative paths start from the dataset's folder, or media_root"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"


def pictures_in(folder: Path) -> tuple[str, ...]:
    """The pictures of a folder that represents a video, in the order of the numbers in their names; no hidden ones."""
    shown = (file for file in folder.iterdir() if not file.name.startswith("."))
    found = [file for file in shown if file.suffix.casefold() in PICTURE_SUFFIXES]
    return tuple(map(str, sorted(found, key=_by_number)))


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _example(fields: Fields, id_: str, media: MediaFiles, source: str) -> Example:
    refs = tuple(media.resolve(medium) for medium in fields.media)
    videos, images = ([ref for ref in refs if ref.is_image is still] for still in (False, True))
    plain = [*videos, *images] == list(refs) and all(ref.cut == Cut() and not ref.frames for ref in refs)
    return Example(
        id=id_,
        question=fields.question,
        answer=fields.answer,
        videos=tuple(ref.path for ref in videos),
        images=tuple(ref.path for ref in images),
        options=tuple(fields.options),
        category=fields.category or NO_CATEGORY,
        metadata=fields.metadata,
        system=fields.system,
        source=source,
        media=() if plain else refs,
        layout=tuple(fields.layout),
        target=fields.target,
    )


def refuse_mistyped_media(row: dict[str, Any], found: list[Fields]) -> None:
    """Refuse a row without media if one of its keys looks like a media key or holds the name of a media file."""
    if any(fields.media for fields in found):
        return
    for key in row:
        near = difflib.get_close_matches(key, MEDIA_KEYS, 1, 0.75)
        if near and key != near[0]:
            raise RowError(f"no video and no image; did you mean {near[0]!r} by {key!r}?")
    for key, value in row.items():
        if key not in TEXT_KEYS and _names_media(value):
            raise RowError(
                f"no video and no image, but {key!r} names {value!r:.60}; call it 'video' or 'image', or put it into "
                "'metadata'"
            )


def _names_media(value: Any) -> bool:
    """Whether a value is the name of a video or picture, or a list of such names."""
    if isinstance(value, list):
        return bool(value) and all(map(_names_media, value))
    return isinstance(value, str) and value.casefold().endswith((*VIDEO_SUFFIXES, *PICTURE_SUFFIXES))


def _no_answer(row: dict[str, Any]) -> str:
    near = difflib.get_close_matches("answer", [key for key in row if key != "answer"], 1, 0.7)
    return "no answer" + (f"; did you mean 'answer' by {near[0]!r}?" if near else "")
