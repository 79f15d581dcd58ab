"""An ablation as a picture: rank-1 and mAP by the rate of occlusion, a line a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.ablation_table import SCORES, spread

# Okabe and Ito's colours, told apart by all eyes, and a marker each; what has neither RRU nor STIM stays grey.
STYLES = {
    "Baseline": ("#A0A0A0", "o"),
    "Baseline+Lv": ("#404040", "s"),
    "Baseline+LSTM+Lv": ("#E69F00", "^"),
    "Baseline+STIM+Lv": ("#56B4E9", "v"),
    "Baseline+RRU+Lv": ("#009E73", "D"),
    "Baseline+RRU+STIM+Lv": ("#CC79A7", "P"),
    "Baseline+RRU+STIM+Lv+Lp": ("#D55E00", "X"),
}
TEXT = "#333333"
APART = 0.075  # of two names beside the lines' ends, at least, in heights of a panel


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
    step = 0.012 * ((rates[-1] - rates[0]) or 1)  # beside each other, so that no bar hides another
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(SCORES)), SCORES, strict=True):
        ends = {}
        for number, row in enumerate(rows):
            colour, marker = STYLES[row]
            spreads = [spread(ablation, row, rate, score) for rate in rates]
            means = [mean for mean, _ in spreads]
            beside = [rate + (number - (len(rows) - 1) / 2) * step for rate in rates]
            bars = [deviation or 0 for _, deviation in spreads]
            axes.errorbar(beside, means, bars, color=colour, marker=marker, markersize=7, elinewidth=1, linewidth=1.8)
            ends[row] = means[-1]
        axes.axhline(100 * runs[0]["chance"], color=TEXT, linestyle="--", linewidth=1)
        axes.text(rates[0], 100 * runs[0]["chance"] + 1, "chance", color=TEXT, fontsize=9)
        axes.set(xticks=rates, ylim=(0, 100), xlabel="occlusion: expected share of frames", ylabel=f"{score}, percent")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT, labelsize=9)
        _label(axes, ends)
    seeds = len({run["seed"] for run in runs})
    caption = (
        f"{ablation['people']} rendered people, half of them held out; bars: one standard deviation of {seeds} seeds"
    )
    figure.supxlabel(caption, fontsize=8, color=TEXT, x=0.01, horizontalalignment="left")
    # Without the name and version of the software, the same runs give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _label(axes: Axes, ends: dict[str, float]) -> None:
    """Name the rows beside the right ends of their lines, moved up where they would overlap, all within the panel."""
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda row: ends[row])
    heights: list[float] = []
    for row in names:
        heights.append(max((ends[row] - low) / (high - low), heights[-1] + APART if heights else 0))
    over = max(0.0, heights[-1] - 1)
    for row, height in zip(names, heights, strict=True):
        name, colour = row.replace("Baseline+", "+"), STYLES[row][0]
        axes.text(1.03, height - over, name, color=colour, transform=axes.transAxes, va="center", fontsize=10)
