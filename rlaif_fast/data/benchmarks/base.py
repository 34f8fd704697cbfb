"""What a benchmark is, and the folder that holds its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlaif_fast.data.errors import RowError
from rlaif_fast.data.media_keys import PICTURE_SUFFIXES, VIDEO_SUFFIXES, read_cut
from rlaif_fast.data.reader import pictures_in
from rlaif_fast.data.schema import Example, option_letters
from rlaif_fast.data.sources import files_below, objects_of
from rlaif_fast.errors import UsageError
from rlaif_fast.video.refs import Cut, MediaRef


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        example: The question; its `asked` is the prompt as the benchmark's authors put it.
        groups: What it is reported by besides its category, such as {"duration": "long"}.
        trouble: Why it cannot be asked, so that it counts as unanswered; empty if it can be asked.
    """

    example: Example
    groups: Mapping[str, str] = field(default_factory=dict)
    trouble: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark.

    Attributes:
        name: Its name on the command line.
        category: What `Example.category` is called in its tables.
        read: Reads the items from a folder.
        subtitles: Whether it has subtitles; `read` then takes `subtitles`, whether to show them.
        in_parts: Whether its answers may have parts, as in files of our own formats; `read` then takes `scored`.
    """

    name: str
    category: str
    read: Callable[..., Iterator[Item]]
    subtitles: bool = False
    in_parts: bool = False


class Folder:
    """A benchmark's folder: its tables by pattern, its videos by name.

    Raises:
        UsageError: There is no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UsageError(
                f"data: {self.path} is no folder; give the folder that holds the benchmark's files"
            )

    def files(self, *patterns: str) -> list[Path]:
        """The files of the first pattern that finds any, in order.

        Raises:
            UsageError: No pattern does, or one that names a single file finds several, maybe of several benchmarks.
        """
        for pattern in patterns:
            if found := self.matching(pattern):
                own = {file.resolve(): file for file in reversed(found)}  # links to one file count once
                if len(own) > 1 and "*" not in Path(pattern).name:
                    places = ", ".join(str(file.relative_to(self.path)) for file in found)
                    raise UsageError(
                        f"data: {self.path} holds {places}; give the folder of one benchmark alone"
                    )
                return sorted(own.values())
        raise UsageError(f"data: {self.path} holds none of {', '.join(patterns)}")

    def rows(self, *patterns: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """("file:line", row) of the files that `files` finds.

        Raises:
            UsageError: There is no such file, or one has a row that cannot be read.
        """
        for file in self.files(*patterns):
            yield from objects_of(file)

    def optional(self, pattern: str) -> Path | None:
        """The first file that matches, if any."""
        return next(iter(self.matching(pattern)), None)

    def matching(self, pattern: str) -> list[Path]:
        """The files whose path below the folder is `pattern`, or after "**/" ends with it, in order."""
        end = pattern.removeprefix("**/")
        depth = None if end != pattern else len(Path(pattern).parts)
        inside = ((path, path.relative_to(self.path)) for path in self._files)
        return [path for path, own in inside if depth in (None, len(own.parts)) and own.match(end)]

    @cached_property
    def _files(self) -> list[Path]:
        return files_below(self.path)

    @cached_property
    def subtitles(self) -> dict[str, Path]:
        """Every subtitle file (.srt) below the folder by its name without suffix; the first of several."""
        return {path.stem: path for path in reversed(self.matching("**/*.srt"))}

    @cached_property
    def _videos(self) -> dict[str, list[Path]]:
        """Every video below the folder, and every folder of pictures, by its name without suffix."""
        found: dict[str, dict[Path, Path]] = {}  # links to one file count as one video
        for path in self._files:
            if path.suffix.casefold() in VIDEO_SUFFIXES:
                found.setdefault(path.stem, {}).setdefault(path.resolve(), path)
            elif path.suffix.casefold() in PICTURE_SUFFIXES:
                found.setdefault(path.parent.name, {}).setdefault(path.parent.resolve(), path.parent)
        return {name: list(paths.values()) for name, paths in found.items()}

    def video(
        self, *names: str, cut: Cut | None = None, home: str | None = None
    ) -> tuple[MediaRef | None, str]:
        """The video of the first name that has one; else None, and why. An ambiguous name is not guessed at.

        Args:
            names: Names with or without suffix, or paths below the folder; a video elsewhere below it is found too.
            cut: What part of it is seen.
            home: Of several videos of one name, the one in a folder of this name ("star"), or of a name that begins
                with it ("star_480").
        """
        for name in names:
            direct, own = self.path / name, Path(name)
            stem = own.stem if own.suffix.casefold() in VIDEO_SUFFIXES else own.name
            # A name that no file system takes does not exist; Path.is_file raises for it.
            paths = [direct] if os.path.isfile(direct) else self._videos.get(stem, [])  # noqa: PTH113
            if len(paths) > 1:
                at_home = [path for path in paths if home and self._lies_in(path, home)]
                paths = at_home if len(at_home) == 1 else paths
            if len(paths) > 1:
                places = ", ".join(str(path.relative_to(self.path)) for path in paths)
                return None, f"{len(paths)} videos are called {stem!r}: {places}"
            if paths:
                frames = pictures_in(paths[0]) if paths[0].is_dir() else ()
                return MediaRef(str(paths[0]), cut=cut or Cut(), frames=frames), ""
        return None, f"no video {' or '.join(map(repr, names))} below {self.path}"

    def _lies_in(self, path: Path, home: str) -> bool:
        above = path.relative_to(self.path).parts[:-1]
        return any(part == home or part.startswith(f"{home}_") for part in above)


def make_item(
    found: tuple[MediaRef | None, str],
    *,
    groups: Mapping[str, str] | None = None,
    **fields: Any,
) -> Item:
    """An item about the video that `Folder.video` found; `fields` are those of `Example`."""
    media, trouble = found
    example = Example(media=() if media is None else (media,), **fields)
    return Item(example, dict(groups or {}), trouble)


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text, or a number as one.

    Raises:
        UsageError: It is missing or of another kind.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise UsageError(
            f"{where}: expected {key!r} to be a text, got {value!r:.60}; is this the benchmark named?"
        )
    return str(value).strip()


def index_of(value: Any, count: int) -> int | None:
    """An index below `count` that a row holds as a number or a text; None if it is not one."""
    digits = str(value)
    known = digits.isdecimal() and len(digits) < 10 and int(digits) < count
    return int(digits) if known else None


def cut_of(row: Mapping[str, Any], where: str) -> Cut:
    """The seconds `start` and `end` of a row.

    Raises:
        UsageError: They are not seconds, or in the wrong order.
    """
    try:
        return read_cut({"video_start": row.get("start"), "video_end": row.get("end")}, "video")
    except RowError as error:
        raise UsageError(
            f"{where}: {str(error).replace('video_start', 'start').replace('video_end', 'end')}"
        ) from None


def letter_of(place: int | None, options: Sequence[str], where: str, answer: Any) -> str:
    """The letter of the option at `place`.

    Raises:
        UsageError: There is none.
    """
    if place is None or not 0 <= place < len(options):
        raise UsageError(f"{where}: the answer {answer!r:.60} is none of the {len(options)} options")
    return option_letters(len(options))[place]
