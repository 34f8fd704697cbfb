"""A contact sheet: frames of clips beside what is asked about them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rlaif_fast.data.schema import Example, option_letters
from rlaif_fast.errors import UsageError


def draw_preview(examples: Sequence[Example], out: str | Path, *, clips: int = 8, frames: int = 6) -> int:
    """Draw the first clips of a dataset, evenly spread frames of each, with their questions and answers.

    Args:
        examples: The rows; those without a video are left out.
        out: PNG to write.
        clips: Most clips to draw.
        frames: Frames of each.

    Returns:
        The number of clips drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rlaif_fast.video import decode, probe

    asked: dict[str, list[Example]] = {}
    for example in examples:
        if example.videos and (example.videos[0] in asked or len(asked) < clips):
            asked.setdefault(example.videos[0], []).append(example)
    if not asked:
        raise UsageError("no row has a video to draw")
    figure = Figure(figsize=(1.3 * frames + 5.5, 1.5 * len(asked)))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(asked), frames + 1, width_ratios=[*[1.3] * frames, 5.5], wspace=0.04, hspace=0.12
    )
    figure.subplots_adjust(left=0.005, right=0.995, top=0.995, bottom=0.005)
    for row, (path, rows) in enumerate(asked.items()):
        info = probe(path)
        indices = [round(k * (info.frames - 1) / max(1, frames - 1)) for k in range(frames)]
        for column, frame in enumerate(decode(path, indices)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(frame.numpy(), interpolation="nearest")
            axes.set_axis_off()
        axes = figure.add_subplot(grid[row, frames])
        axes.set_axis_off()
        lines = [textwrap.shorten(_wording(example), 110) for example in rows[:9]]
        axes.text(0.02, 0.98, "\n".join(lines), va="top", fontsize=6.5, transform=axes.transAxes)
    figure.savefig(out, dpi=110)
    return len(asked)


def _wording(example: Example) -> str:
    letters = option_letters(len(example.options))
    options = " ".join(f"{letter}. {option}" for letter, option in zip(letters, example.options))
    return " ".join(part for part in (example.question, options, "→", example.answer or "?") if part)
