"""What goes wrong with a media file."""

from __future__ import annotations

import re

from rlaif_fast.errors import Outage, RlaifFastError


class VideoError(RlaifFastError):
    """A video or image file cannot be used, and why.

    Args:
        path: The file.
        reason: One clause, e.g. "truncated: the container spans 11023 bytes, the file has 248".
    """

    def __init__(self, path: str, reason: str) -> None:
        name = path.replace("\n", "\\n").replace("\t", "\\t")
        super().__init__(f"{name}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return (VideoError, (self.path, self.reason))


def kind_of(reason: str) -> str:
    """Return what reasons of one kind share: without the figures and what follows the colon."""
    return re.sub(r"\d+", "N", reason.split(":")[0])


class TooManyBadFiles(Outage):
    """More files are bad than `max_bad_fraction` allows; the message is a summary by reason."""
