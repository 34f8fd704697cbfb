"""A contact sheet: the frames that the model would see, with their times."""

from __future__ import annotations

import math
from pathlib import Path

from rlaif_fast.errors import UsageError
from rlaif_fast.video.base import Clip, VideoInfo

COLUMNS = 6
INK, FAINT = "#1a1a1a", "#6b6b6b"


def draw_contact_sheet(
    clip: Clip,
    info: VideoInfo,
    indices: list[int],
    out: str | Path,
    *,
    most: int = 48,
    columns: int = COLUMNS,
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
    height, width = clip.frames.shape[1:3]
    cell_width = 2.1 if width >= height else 1.4
    picture_height = cell_width * height / width
    cell_height = picture_height + 0.26  # inches; the caption stands below
    head = 0.72
    figure = Figure(
        figsize=(max(6.4, columns * cell_width + 0.3), head + rows * cell_height + 0.1), facecolor="white"
    )
    FigureCanvasAgg(figure)
    total_width, total_height = figure.get_size_inches()
    name = Path(info.path).name
    figure.text(
        0.15 / total_width,
        1 - 0.24 / total_height,
        name,
        size=11,
        weight="bold",
        color=INK,
        va="center",
        parse_math=False,
    )
    figure.text(
        0.15 / total_width,
        1 - 0.50 / total_height,
        f"{info.width}x{info.height} {info.codec} {info.pixel_format}   {info.frames} frames, "
        f"{info.fps:.4g} fps{' on average' if info.variable_rate else ''}, {info.duration:.2f} s"
        + (f", turned {info.rotation}°" if info.rotation else "")
        + f"   {count} sampled at {clip.sample_fps:.3g} fps"
        + (f", {len(shown)} drawn" if len(shown) < count else ""),
        size=8,
        color=FAINT,
        va="center",
    )
    for place, k in enumerate(shown):
        row, column = divmod(place, columns)
        left = 0.15 + column * cell_width
        bottom = total_height - head - (row + 1) * cell_height + 0.26
        axes = figure.add_axes(
            (
                left / total_width,
                bottom / total_height,
                (cell_width - 0.08) / total_width,
                (picture_height - 0.05) / total_height,
            )
        )
        axes.imshow(clip.frames[k].cpu().numpy(), interpolation="antialiased", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#cccccc")
        caption = f"#{indices[k]}   {clip.timestamps[k]:.2f} s"
        axes.text(0, -0.04, caption, transform=axes.transAxes, size=7, color=FAINT, va="top")
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out}: cannot be written: {error}") from None
    return len(shown)
