"""Parts of pictures: labels at the ends of lines, frames, and the PNG file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.data.tracklets import Tracklet, read_frame
from training.runtime.errors import UserError

Extent: TypeAlias = tuple[float, float, float, float]
LETTERS = 14  # of a name on one line
SPACING = 0.055  # smallest distance between two labels, as a share of the panel's height


def png(figure: Figure) -> bytes:
    """Return the content of a figure's PNG file; the same figure gives the same bytes."""
    page = BytesIO()
    figure.savefig(page, format="png", metadata={"Software": None})  # Matplotlib's version, which may differ
    return page.getvalue()


def pixels(tracklet: Tracklet, frame: int) -> np.ndarray:
    """Read a frame of a tracklet as RGB, (h, w, 3) uint8.

    Raises:
        UserError: it cannot be read.
    """
    return np.asarray(read_frame(tracklet.frames[frame]).permute(1, 2, 0))


def fitted(frame: np.ndarray, left: float, top: float, width: float, height: float) -> Extent:
    """Return the extent (left, right, bottom, top) of a frame centered in a box, at its aspect ratio; y points down."""
    h, w = frame.shape[:2]
    scale = min(width / w, height / h)
    left, top = left + (width - w * scale) / 2, top + (height - h * scale) / 2
    return left, left + w * scale, top + h * scale, top


def index_of(name: str, tracklets: Sequence[Tracklet], option: str) -> int:
    """Return the index of the tracklet with a name, of which the time, "@0:00.0-0:20.9", may be left out if one has it.

    Raises:
        UserError: no tracklet has it; the message names the option.
    """
    names = [tracklet.name for tracklet in tracklets]
    if name in names:
        return names.index(name)
    timed = {known for known in names if known.partition("@")[0] == name}
    if len(timed) != 1:
        raise UserError(f"{option}: got {name!r}, wanted the name of a tracklet such as {', '.join(names[:3])}")
    return names.index(timed.pop())


def break_name(name: str) -> str:
    """Break a tracklet's name into lines of at most LETTERS, if its parts allow; the time is on a line of its own."""
    lines = [""]
    for part in re.split("(?<=/)|(?=@)", name):
        if lines[-1] and (part.startswith("@") or len(lines[-1] + part) > LETTERS):
            lines.append("")
        lines[-1] += part.removeprefix("@")
    return "\n".join(lines)


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Label lines at their right ends (x, percent), without overlap.

    Args:
        axes: of a panel from 0 to 100 percent.
        ends: the right end of each line, by its label.
        colors: of each label.
    """
    names = sorted(ends, key=lambda name: ends[name][1])
    for name, height in zip(names, label_heights([ends[name][1] / 100 for name in names]), strict=True):
        axes.annotate(
            name,
            xy=ends[name],
            xytext=(1.08, height),
            textcoords="axes fraction",
            color=colors[name],
            fontsize=10,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.8, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def label_heights(ends: Sequence[float]) -> np.ndarray:
    """Return heights from 0 to 1, at least SPACING from each other, with the least sum of squares to the ends.

    Args:
        ends: heights of the lines' right ends, from the lowest.
    """
    from scipy.optimize import isotonic_regression  # takes 0.25 s to import, which other pictures need not wait for

    offsets = SPACING * np.arange(len(ends))
    heights: np.ndarray = isotonic_regression(ends - offsets).x.clip(0, 1 - offsets[-1]) + offsets
    return heights
