"""A contact sheet: frames of clips and images beside the questions about them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_fast.data.schema import Example, lettered
from rlaif_fast.errors import UsageError, require_least
from rlaif_fast.outputs import save_figure
from rlaif_fast.video.refs import Cut, MediaRef

if TYPE_CHECKING:
    from torch import Tensor


def draw_preview(examples: Sequence[Example], out: str | Path, *, clips: int = 8, frames: int = 6) -> int:
    """Draw evenly spaced frames of what the first rows of a dataset see, with their questions and answers.

    Args:
        examples: The rows; those about the same media share a line, those without media are left out.
        out: Picture to write; its suffix names the format.
        clips: Most lines to draw.
        frames: Most pictures in one line, over all its media.

    Returns:
        The number of lines drawn.

    Raises:
        UsageError: A number is below 1, no row has a medium, or the picture cannot be written.
        VideoError: A medium cannot be decoded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    require_least("clips", clips, 1)
    require_least("frames", frames, 1)
    asked: dict[tuple[MediaRef, ...], list[Example]] = {}
    for example in examples:
        if example.seen and (example.seen in asked or len(asked) < clips):
            asked.setdefault(example.seen, []).append(example)
    if not asked:
        raise UsageError("no row has a video or an image to draw")
    lines = [(_pictures(media, frames), rows) for media, rows in asked.items()]
    columns = max(len(pictures) for pictures, _ in lines)
    figure = Figure(figsize=(1.3 * columns + 5.5, 1.5 * len(lines)))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(lines), columns + 1, width_ratios=[*[1.3] * columns, 5.5], wspace=0.04, hspace=0.12
    )
    figure.subplots_adjust(left=0.005, right=0.995, top=0.995, bottom=0.005)
    for row, (pictures, rows) in enumerate(lines):
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set_axis_off()
        axes = figure.add_subplot(grid[row, columns])
        axes.set_axis_off()
        texts = [textwrap.shorten(_wording(example), 110) for example in rows[:9]]
        axes.text(
            *(0.02, 0.98),
            "\n".join(texts),
            va="top",
            fontsize=6.5,
            transform=axes.transAxes,
            parse_math=False,
        )
    try:
        save_figure(figure, Path(out), dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out}: cannot be written: {error}") from None
    return len(lines)


def _pictures(media: Sequence[MediaRef], most: int) -> list[Tensor]:
    """At most `most` pictures of the media, in their order: equally many of each, only from the part that is seen."""
    from rlaif_fast.video import FrameSampling, load_medium

    each = max(1, most // len(media))
    every = FrameSampling(fps=1000.0, min_frames=1, max_frames=each, frame_factor=1)
    pictures: list[Tensor] = []
    for medium in media[:most]:
        part = Cut(video_start=medium.cut.video_start, video_end=medium.cut.video_end)
        pictures.extend(load_medium(replace(medium, cut=part), every).frames)
    return pictures


def _wording(example: Example) -> str:
    return " ".join((example.question, *lettered(example.options), "→", example.answer or "?"))
