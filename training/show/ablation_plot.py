"""Ablation plot: rank-1 and mAP over the rate of occlusion, one line per row."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from build_tools.palette import GREEN, ORANGE, PURPLE, QUIET, RED, SKY, TEXT
from training.reports.ablation_table import SCORES, spread
from training.show.picture import label_ends

# A color and a marker per row; gray for rows without RRU, STIM and LSTM.
STYLES = {
    "Baseline": (QUIET, "o"),
    "Baseline+Lv": ("#404040", "s"),
    "Baseline+LSTM+Lv": (ORANGE, "^"),
    "Baseline+STIM+Lv": (SKY, "v"),
    "Baseline+RRU+Lv": (GREEN, "D"),
    "Baseline+RRU+STIM+Lv": (PURPLE, "P"),
    "Baseline+RRU+STIM+Lv+Lp": (RED, "X"),
}


def draw(ablation: dict[str, Any]) -> Figure:
    """Draw one panel per score: means over the seeds, with error bars of one standard deviation.

    Args:
        ablation: the content of `ablation.json`.
    """
    runs = ablation["runs"]
    rates, rows = (list(dict.fromkeys(run[name] for run in runs)) for name in ("occlusion", "row"))
    step = 0.016 * ((rates[-1] - rates[0]) or 1)  # rows are shifted sideways, so that no error bar hides another
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(SCORES))
    for axes, score in zip(grid, SCORES, strict=True):
        ends = {}
        for number, row in enumerate(rows):
            color, marker = STYLES[row]
            spreads = [spread(ablation, row, rate, score) for rate in rates]
            means, deviations = [mean for mean, _ in spreads], [deviation or 0 for _, deviation in spreads]
            shifted = [rate + (number - (len(rows) - 1) / 2) * step for rate in rates]
            look = {"color": color, "marker": marker, "markersize": 6, "elinewidth": 1.2, "linewidth": 1.6}
            axes.errorbar(shifted, means, deviations, capsize=2, **look)
            ends[row.replace("Baseline+", "+")] = shifted[-1], means[-1]
        axes.set(xticks=rates, xticklabels=[f"{rate:g}" for rate in rates], ylim=(0, 100))
        axes.set(xlabel="occlusion: expected share of frames", ylabel=f"{score}, percent")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT, labelsize=9)
        label_ends(axes, ends, {row.replace("Baseline+", "+"): color for row, (color, _) in STYLES.items()})
    chance, first = 100 * runs[0]["chance"], grid[0]
    first.axhline(chance, color=TEXT, linestyle="--", linewidth=1)  # of rank-1 alone
    first.text(0.01, chance + 1, "chance", color=TEXT, fontsize=9, transform=first.get_yaxis_transform(), va="bottom")
    people = f"{ablation['people']} rendered people, half of them held out; {ablation['epochs']} epochs"
    seeds = len({run["seed"] for run in runs})
    bars = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else "; one seed"
    figure.supxlabel(f"{people}{bars}", fontsize=8, color=TEXT, x=0.01, horizontalalignment="left")
    return figure
