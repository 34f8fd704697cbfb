"""A contact sheet: the frames that the model would see, with their times."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlaif_fast.errors import UsageError
from rlaif_fast.outputs import save_figure
from rlaif_fast.video.base import Clip, VideoInfo

INK, FAINT = "#1a1a1a", "#6b6b6b"
MARGIN, GAP, HEAD, CAPTION = 0.15, 0.08, 0.72, 0.26  # inches


def describe(info: VideoInfo) -> str:
    """One line on what a video file holds."""
    rate = f"{info.fps:.4g} fps" + (" on average" if info.variable_rate else "")
    turned = f", turned {info.rotation}°" if info.rotation else ""
    size = f"{info.width}x{info.height}"
    length = f"{info.frames} frame{'s' if info.frames != 1 else ''}, {rate}, {info.duration:.2f} s"
    return f"{info.codec} {size} {info.pixel_format}, {length}{turned}"


def draw_contact_sheet(
    clip: Clip,
    info: VideoInfo,
    indices: list[int],
    out: str | Path,
    *,
    most: int = 48,
    columns: int = 6,
) -> int:
    """Draw the sampled frames of a clip and return how many were drawn.

    Args:
        clip: The frames.
        info: The probed video.
        indices: Which frame of the video each one is.
        out: Picture to write; the ending names the format.
        most: More frames than this are thinned out evenly.
        columns: Frames in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(indices)
    shown = (
        list(range(count)) if count <= most else [round(k * (count - 1) / (most - 1)) for k in range(most)]
    )
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    tall, wide = clip.frames.shape[1:3]
    cell_width = 2.1 if wide >= tall else 1.4
    picture_height = cell_width * tall / wide
    cell_height = picture_height + CAPTION  # the caption stands below
    width, height = max(6.4, columns * cell_width + 2 * MARGIN), HEAD + rows * cell_height + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    drawn = f", {len(shown)} drawn" if len(shown) < count else ""
    about = f"{describe(info)}; {count} sampled at {clip.sample_fps:.3g} fps{drawn}"
    line: dict[str, Any] = {"x": MARGIN / width, "va": "center", "parse_math": False}
    figure.text(y=1 - 0.24 / height, s=Path(info.path).name, size=11, weight="bold", color=INK, **line)
    figure.text(y=1 - 0.50 / height, s=about, size=8, color=FAINT, **line)
    for place, k in enumerate(shown):
        row, column = divmod(place, columns)
        left = MARGIN + column * cell_width
        bottom = height - HEAD - (row + 1) * cell_height + CAPTION
        size = (cell_width - GAP) / width, (picture_height - 0.05) / height
        axes = figure.add_axes((left / width, bottom / height, *size))
        axes.imshow(clip.frames[k].cpu().numpy(), interpolation="antialiased", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#cccccc")
        caption = f"#{indices[k]}   {clip.timestamps[k]:.2f} s"
        axes.text(0, -0.04, caption, transform=axes.transAxes, size=7, color=FAINT, va="top")
    try:
        save_figure(figure, Path(out), dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out}: cannot be written: {error}") from None
    return len(shown)
