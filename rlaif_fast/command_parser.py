"""The parser of the commands that have options of their own, besides the keys of a configuration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rlaif_fast.cli import tell


class CommandParser(argparse.ArgumentParser):
    """A parser for flags without abbreviations and for paths, also in its subcommands.

    In a path it expands `~`; an empty one is wrong usage. Of a flag that is given twice, it tells which value wins.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})
        self.register("type", Path, _path)
        self.register("action", None, _Store)


class _Store(argparse.Action):
    """What argparse does where no action is named."""

    flags = 0

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        self.flags += option_string is not None
        if self.flags > 1:
            tell(f"{self.dest}: {values!r} (the last of {self.flags} flags)")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    # A shell does not expand it in --KEY=~/PATH.
    return Path(expanded(text))


def expanded(text: str) -> str:
    """A path with `~` replaced by the home folder; the `~` of an unknown user stays."""
    return os.path.expanduser(text)  # noqa: PTH111 - pathlib's raises then
