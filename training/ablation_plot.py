"""An ablation as a picture: rank-1 and mAP by the rate of occlusion, a line a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from training.ablation_table import SCORES, spread

# Okabe and Ito's colours, told apart by all eyes, and a marker each; what has neither RRU nor STIM stays grey.
STYLES = {
    "Baseline": ("#8A8A8A", "o"),
    "Baseline+Lv": ("#404040", "s"),
    "Baseline+LSTM+Lv": ("#E69F00", "^"),
    "Baseline+STIM+Lv": ("#56B4E9", "v"),
    "Baseline+RRU+Lv": ("#009E73", "D"),
    "Baseline+RRU+STIM+Lv": ("#CC79A7", "P"),
    "Baseline+RRU+STIM+Lv+Lp": ("#D55E00", "X"),
}
TEXT = "#333333"
APART = 0.055  # of two names beside the lines' ends, at least, in heights of a panel


def draw(ablation: dict[str, Any], path: Path) -> None:
    """Draw a panel a score: means over the seeds, with bars of one standard deviation.

    Args:
        ablation: what `ablation.json` holds.
        path: of the PNG.

    Raises:
        OSError: it cannot be written.
    """
    runs = ablation["runs"]
    rates, rows = (list(dict.fromkeys(run[name] for run in runs)) for name in ("occlusion", "row"))
    step = 0.016 * ((rates[-1] - rates[0]) or 1)  # beside each other, so that no bar hides another
    figure = Figure(figsize=(12, 5), layout="constrained")
    grid = figure.subplots(1, len(SCORES))
    for axes, score in zip(grid, SCORES, strict=True):
        ends = {}
        for number, row in enumerate(rows):
            colour, marker = STYLES[row]
            spreads = [spread(ablation, row, rate, score) for rate in rates]
            means, deviations = [mean for mean, _ in spreads], [deviation or 0 for _, deviation in spreads]
            beside = [rate + (number - (len(rows) - 1) / 2) * step for rate in rates]
            look = {"color": colour, "marker": marker, "markersize": 6, "elinewidth": 1.2, "linewidth": 1.6}
            axes.errorbar(beside, means, deviations, capsize=2, **look)
            ends[row] = beside[-1], means[-1]
        axes.set(xticks=rates, xticklabels=[f"{rate:g}" for rate in rates], ylim=(0, 100))
        axes.set(xlabel="occlusion: expected share of frames", ylabel=f"{score}, percent")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT, labelsize=9)
        _label(axes, ends)
    chance, first = 100 * runs[0]["chance"], grid[0]
    first.axhline(chance, color=TEXT, linestyle="--", linewidth=1)  # of rank-1 alone
    first.text(0.01, chance - 1, "chance", color=TEXT, fontsize=9, transform=first.get_yaxis_transform(), va="top")
    people = f"{ablation['people']} rendered people, half of them held out; {ablation['epochs']} epochs"
    seeds = len({run["seed"] for run in runs})
    bars = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else "; one seed"
    figure.supxlabel(f"{people}{bars}", fontsize=8, color=TEXT, x=0.01, horizontalalignment="left")
    # Without the name and version of the software, the same runs give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _label(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Name the rows beside the right ends (x, percent) of their lines, as near as names can stand to each other."""
    names = sorted(ends, key=lambda row: ends[row][1])
    for row, height in zip(names, heights_of_names([ends[row][1] / 100 for row in names]), strict=True):
        colour = STYLES[row][0]
        axes.annotate(
            row.replace("Baseline+", "+"),
            xy=ends[row],
            xytext=(1.08, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=10,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def heights_of_names(ends: Sequence[float]) -> np.ndarray:
    """Heights from 0 to 1, at least APART from each other, that are nearest to the ends in the sum of squares.

    Args:
        ends: heights of lines' right ends, from the lowest.
    """
    apart = APART * np.arange(len(ends))
    heights: np.ndarray = isotonic_regression(ends - apart).x.clip(0, 1 - apart[-1]) + apart
    return heights
