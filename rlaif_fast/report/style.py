"""How figures look, and how they show names in any script."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.font_manager import fontManager

INK, MUTED, GRID = "#1d2433", "#667085", "#e3e6ec"
BEFORE, AFTER, THIRD = "#8b94a7", "#0b7a75", "#b5651d"
COLORS = {"ink": INK, "muted": MUTED, "grid": GRID, "before": BEFORE, "after": AFTER, "third": THIRD}

STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
}
# Fallbacks for DejaVu Sans: the first of these that is installed and has the character is used.
FURTHER_FONTS = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Noto Sans CJK KR",
        "Source Han Sans SC",
        "WenQuanYi Micro Hei",
    ),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans"),
    *("Noto Sans Devanagari", "Noto Sans Thai"),
)


@contextmanager
def drawing(style: dict[Any, Any]) -> Iterator[None]:
    """A block that draws and saves figures with names from a dataset, in any script.

    A character that no installed font has is a box in a PNG; in an SVG the reader's fonts show it.

    Args:
        style: Matplotlib settings.
    """
    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in FURTHER_FONTS if name in installed)]
    # A dollar sign in a name must not start a formula.
    with (
        matplotlib.rc_context({**style, "font.family": families, "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
