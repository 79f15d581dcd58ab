"""What all drawings share: a colour and a name for each implementation, and how a file says what it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from math import log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from benchmarks.batch_hard import PEER
from benchmarks.implementations.refine import AUTHORS, COMPILED, REFERENCE

# Okabe and Ito's colours, told apart by all eyes; what is plain PyTorch stays grey.
COLOURS = {
    AUTHORS: "#8A8A8A",
    REFERENCE: "#404040",
    "eager": "#404040",
    COMPILED: "#CC79A7",
    PEER: "#E69F00",
    "composite": "#56B4E9",
    "cpu": "#D55E00",
    "triton": "#009E73",
    "cuda": "#0072B2",
}
TEXT = "#333333"


def plain(axes: Axes) -> None:
    """Nothing but what is read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT, labelsize=9)


def label(axes: Axes, ends: Mapping[str, tuple[float | None, str]]) -> None:
    """Names at the right ends of lines, (height, colour) each, moved apart where they would overlap."""
    there = [(value, colour, name) for name, (value, colour) in ends.items() if value is not None]
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    least = -1.0
    for value, colour, name in sorted(there):
        height = log(value / low) / log(high / low) if logarithmic else (value - low) / (high - low)
        least = max(height, least + 0.075)
        axes.text(1.03, least, name, color=colour, transform=axes.transAxes, verticalalignment="center", fontsize=9)


def caption(figure: Figure, text: str) -> None:
    """What the figures mean nothing without, below them."""
    figure.supxlabel(text, fontsize=8, color=TEXT, x=0.01, horizontalalignment="left")


def save(figure: Figure, source: str, path: Path) -> None:
    """Write a PNG that says what it was drawn from; the same drawing by the same software gives the same file."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    said = PngInfo()
    said.add_text("Source", source)
    # Of a palette: a third of the size, and nothing that is seen is lost.
    flat = Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)
    flat.save(path, format="PNG", pnginfo=said, optimize=True)


def source(path: Path) -> str | None:
    """What a PNG was drawn from, if there is one that says it."""
    try:
        with Image.open(path) as image:
            said = image.info.get("Source")
    except (FileNotFoundError, UnidentifiedImageError):
        return None
    return None if said is None else str(said)
