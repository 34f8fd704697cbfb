"""The media of rows ranked from a file, found as the dataset reader finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_fast.data.converters import Fields, place_media
from rlaif_fast.data.errors import RowError
from rlaif_fast.data.media_keys import row_media
from rlaif_fast.data.published import named_video
from rlaif_fast.data.reader import MediaFiles, refuse_mistyped_media
from rlaif_fast.errors import UsageError
from rlaif_fast.video import FrameSampling, PixelBudget, VideoError, load_medium, probe
from rlaif_fast.video.base import Clip
from rlaif_fast.video.image import MAX_IMAGE_PIXELS
from rlaif_fast.video.refs import MediaRef

_ANY_SIZE = PixelBudget(factor=1, min_pixels=1, max_pixels=MAX_IMAGE_PIXELS)


class RowClips:
    """Finds, checks and loads the media of rows.

    Args:
        root: Folder that relative paths start from.
        nframes: Frames of a video whose row does not say which are seen.

    Raises:
        UsageError: `nframes` is less than a model sees at a time.
    """

    def __init__(self, root: Path, nframes: int) -> None:
        self.files = MediaFiles(root, check=True)
        self._sampling = FrameSampling(nframes=nframes)
        fault = self._sampling.fault()
        if fault is not None:
            raise UsageError(fault)
        self._opened: set[MediaRef] = set()

    def find(self, row: Mapping[str, Any], where: str) -> tuple[MediaRef, ...]:
        """The media of a row in the order its question shows them.

        Args:
            row: A dataset row with a `question`.
            where: Its place, "file:line".

        Raises:
            UsageError: A medium is missing, of an unsupported kind, or has keys that do not fit.
        """
        try:
            media = row_media(row)
            if not media and (video := named_video(row)) is not None:
                media = [video]
            fields = Fields(row["question"], media=media)
            refuse_mistyped_media(dict(row), [fields])
            place_media(fields, row)
            return tuple(map(self.files.resolve, fields.media))
        except RowError as error:
            raise UsageError(f"{where}: {error}") from None

    def check(self, media: Sequence[MediaRef], where: str) -> None:
        """Open each medium once, and find the frames that its row asks for.

        Raises:
            UsageError: A file is bad, or holds too few frames.
        """
        for medium in media:
            if medium in self._opened:
                continue
            self._opened.add(medium)
            if not medium.is_video_file:
                self.load([medium], where)
                continue
            try:
                self._sampling.cut(medium).sample(probe(medium.path))
            except VideoError as error:
                raise UsageError(f"{where}: {error}") from None

    def load(self, media: Sequence[MediaRef], where: str) -> list[Clip]:
        """The decoded media, in their order.

        Raises:
            UsageError: A file is bad, or holds too few frames.
        """
        try:
            return [load_medium(medium, self._sampling, resize=_resize(medium)) for medium in media]
        except VideoError as error:
            raise UsageError(f"{where}: {error}") from None


def _resize(medium: MediaRef) -> PixelBudget | None:
    """The bounds that a row sets on its frames; None if it sets none, and frames keep their size."""
    return _ANY_SIZE if any(key.endswith("_pixels") for key in medium.cut.given()) else None
