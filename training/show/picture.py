"""What pictures share: colours that all eyes tell apart, names beside lines, frames, and the PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.data.tracklets import Tracklet, read_frame
from training.runtime.errors import UserError

# Okabe and Ito's.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
TEXT, QUIET = "#333333", "#8A8A8A"
Extent: TypeAlias = tuple[float, float, float, float]
APART = 0.055  # of two names beside the lines' ends, at least, in heights of a panel


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's content; the same figure gives the same bytes."""
    page = BytesIO()
    figure.savefig(page, format="png", metadata={"Software": None})  # its version would differ
    return page.getvalue()


def pixels(tracklet: Tracklet, frame: int) -> np.ndarray:
    """A frame of a tracklet as RGB, (h, w, 3) uint8.

    Raises:
        UserError: it cannot be read.
    """
    return np.asarray(read_frame(tracklet.frames[frame]).permute(1, 2, 0))


def fitted(frame: np.ndarray, left: float, top: float, width: float, height: float) -> Extent:
    """The extent (left, right, bottom, top) of a frame, as large as fits in the middle of a box; y points down."""
    h, w = frame.shape[:2]
    scale = min(width / w, height / h)
    left, top = left + (width - w * scale) / 2, top + (height - h * scale) / 2
    return left, left + w * scale, top + h * scale, top


def index_of(name: str, tracklets: Sequence[Tracklet], option: str) -> int:
    """Which of the tracklets has a name.

    Raises:
        UserError: none has; the option is named.
    """
    names = [tracklet.name for tracklet in tracklets]
    if name not in names:
        raise UserError(f"{option}: got {name!r}, wanted the name of a tracklet such as {', '.join(names[:3])}")
    return names.index(name)


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Name lines beside their right ends (x, percent), as near as names can stand to each other."""
    names = sorted(ends, key=lambda name: ends[name][1])
    for name, height in zip(names, heights_of_names([ends[name][1] / 100 for name in names]), strict=True):
        axes.annotate(
            name,
            xy=ends[name],
            xytext=(1.08, height),
            textcoords="axes fraction",
            color=colours[name],
            fontsize=10,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.8, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def heights_of_names(ends: Sequence[float]) -> np.ndarray:
    """Heights from 0 to 1, at least APART from each other, that are nearest to the ends in the sum of squares.

    Args:
        ends: heights of lines' right ends, from the lowest.
    """
    from scipy.optimize import isotonic_regression  # a quarter of a second, which only the curves are worth

    apart = APART * np.arange(len(ends))
    heights: np.ndarray = isotonic_regression(ends - apart).x.clip(0, 1 - apart[-1]) + apart
    return heights
