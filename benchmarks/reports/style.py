"""Style of all drawings: a color per implementation, labels, captions, and PNGs that record their source."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from benchmarks.implementations.batch_hard import PEER
from benchmarks.implementations.refine import AUTHORS, COMPILED, REFERENCE
from build_tools.palette import BLUE, GREEN, ORANGE, PURPLE, QUIET, RED, SKY, TEXT

# Plain PyTorch is gray.
COLORS = {
    AUTHORS: QUIET,
    REFERENCE: "#404040",
    "eager": "#404040",
    COMPILED: PURPLE,
    PEER: ORANGE,
    "composite": SKY,
    "cpu": RED,
    "triton": GREEN,
    "cuda": BLUE,
}


def simplify(axes: Axes) -> None:
    """Remove the frame on the top and on the right, and shrink the tick labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT, labelsize=9)


def label(axes: Axes, ends: Mapping[str, tuple[float | None, str]]) -> None:
    """Name lines next to their right ends, moved up where the names would overlap.

    ends: height, in data coordinates, and color of each line, by its name; a line without a height has no label.
    """
    found = [(value, color, name) for name, (value, color) in ends.items() if value is not None]
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    least = -1.0
    for value, color, name in sorted(found):
        height = log(value / low) / log(high / low) if logarithmic else (value - low) / (high - low)
        least = max(height, least + 0.075)
        axes.text(1.03, least, name, color=color, transform=axes.transAxes, verticalalignment="center", fontsize=9)


def caption(figure: Figure, text: str) -> None:
    """Write the conditions of the measurement below the figure."""
    figure.supxlabel(text, fontsize=8, color=TEXT, x=0.01, horizontalalignment="left")


def save(figure: Figure, source: str, path: Path) -> None:
    """Write a PNG that records `source`; the same figure with the same software gives the same bytes."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    info = PngInfo()
    info.add_text("Source", source)
    # A palette of 128 colors is a third of the size, without a visible loss.
    flat = Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)
    flat.save(path, format="PNG", pnginfo=info, optimize=True)


def source(path: Path) -> str | None:
    """Return the source that a PNG records, None if there is no such file or record."""
    try:
        with Image.open(path) as image:
            found = image.info.get("Source")
    except (FileNotFoundError, UnidentifiedImageError):
        return None
    return None if found is None else str(found)
