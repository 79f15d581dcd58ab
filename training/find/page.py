"""One picture of who was looked for and who was found: a strip of crops for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from build_tools.palette import BLUE, QUIET, TEXT
from training.find.matches import Match
from training.show.picture import fitted

CROPS = 8  # per strip
WIDE, TALL = 1.0, 2.0  # width and height of a crop's box
STEP, ROW = 1.08, 2.3  # distance from crop to crop, and from strip to strip
LABEL = 2.5  # width of the label of a strip
LINE, LETTERS = 0.3, 95  # height of a heading's line, and its length in letters
SCALE = 0.72  # inches per width

Crops = Sequence[np.ndarray]  # (h, w, 3) uint8 RGB each, in order of time


def page(heading: str, name: str, person: Crops, matches: Sequence[Match], strips: Mapping[int, Crops]) -> Figure:
    """Draw a strip of the person looked for, if any, and one for each match.

    Args:
        heading: over the matches.
        name: of the person.
        person: crops of the person; none for a list of everybody.
        matches: in the order in which they are drawn, at least one.
        strips: crops of each match, by the number of its track.
    """
    headings = [wrap(text, LETTERS) for text in (*([f"looked for: {name}"] if person else ()), heading)]
    width = LABEL + STEP * CROPS + 0.1
    height = sum(LINE * (len(lines) + 1) for lines in headings) + ROW * (len(matches) + bool(person)) + 0.1
    figure = Figure(figsize=(SCALE * width, SCALE * height), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    top = 0.0
    if person:
        top = _heading(axes, headings[0], top)
        _strip(axes, person, top, BLUE)
        top += ROW
    top = _heading(axes, headings[-1], top)
    for match in matches:
        track, lines = match.track, [match.times, f"{len(match.track.frames)} frames"]
        number = f"{track.number}" if match.score is None else f"{match.rank}"
        axes.text(0.15, top + 0.05, number, color=TEXT, fontsize=20, weight="bold", va="top")
        if match.score is not None:
            lines = [f"score {match.score:.3f}", *lines, f"track {track.number}"]
        axes.text(0.15, top + 0.75, "\n".join(lines), color=TEXT, fontsize=9, va="top", linespacing=1.35)
        _strip(axes, strips[match.track.number], top, QUIET)
        top += ROW
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def places(count: int) -> list[int]:
    """Return which of a track's frames are drawn: at most CROPS, evenly spaced."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(CROPS, count))})


def _heading(axes: Axes, lines: Sequence[str], top: float) -> float:
    """Write the lines of a heading; return where it ends."""
    for number, line in enumerate(lines, start=1):
        axes.text(0.15, top + LINE * number, line, color=TEXT, fontsize=11, va="center")
    return top + LINE * (len(lines) + 1)


def _strip(axes: Axes, crops: Crops, top: float, color: str) -> None:
    for place, crop in enumerate(crops):
        x0, x1, y1, y0 = fitted(crop, LABEL + STEP * place, top, WIDE, TALL)
        axes.imshow(crop, extent=(x0, x1, y1, y0))
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.5))
