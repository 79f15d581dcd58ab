"""Measured runs as pictures: bars of time beside the roofline, and time and speed-up along each axis of scaling."""

from __future__ import annotations

from itertools import groupby
from math import log
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import AUTHORS, COMPILED, REFERENCE
from benchmarks.scaling import AXES
from benchmarks.table import Row, cell

# Okabe and Ito's colours, told apart by all eyes; what is plain PyTorch stays grey.
COLOURS = {
    AUTHORS: "#8A8A8A",
    REFERENCE: "#404040",
    COMPILED: "#CC79A7",
    "composite": "#56B4E9",
    "cpu": "#D55E00",
    "triton": "#009E73",
    "cuda": "#0072B2",
}
TEXT = "#333333"
NAMES = {"B": "B, clips", "T": "T, frames", "C": "C, channels", "threads": "threads"}


def refine(run: dict[str, Any], caption: str, path: Path) -> None:
    """A panel a mode and dtype: the time of each implementation, and the roofline's."""

    def panel(row: Row) -> tuple[Any, ...]:
        return row["mode"], row["dtype"], tuple(row["shape"])

    panels = [(key, list(rows)) for key, rows in groupby(run["rows"], key=panel)]
    figure = Figure(figsize=(3.3 * len(panels) + 1.6, 3.6), layout="constrained")
    # Shared, so that an implementation stands at one height in all panels and is named once.
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, ((mode, dtype, shape), rows) in zip(grid, panels, strict=True):
        column, what = ("fwd+bwd ms", "forward + backward") if mode == "training" else ("forward ms", "forward")
        times, names = [row[column] for row in rows], [row["implementation"] for row in rows]
        bars = axes.barh(names, times, color=[COLOURS[name] for name in names], height=0.65)
        axes.bar_label(bars, [f"{cell('', time)} ms" for time in times], padding=4, color=TEXT, fontsize=9)
        floor = rows[0]["roofline ms"]
        axes.axvline(floor, color=TEXT, linestyle="--", linewidth=1)
        above = axes.get_xaxis_transform()  # x in data, y in the panel's height
        axes.text(floor, 0.98, f" roofline {cell('', floor)} ms", color=TEXT, fontsize=9, transform=above, va="top")
        axes.set(xlim=(0, 1.35 * max(times)), xlabel=f"{what}, ms")
        axes.set_title(f"{mode}, {dtype}\n{cell('', shape)}", fontsize=10, loc="left")
        _plain(axes)
    most = max(len(rows) for _, rows in panels)
    grid[0].set_ylim(most - 0.5, -1)  # the first on top, and above it room for the roofline's name
    _save(figure, f"refine (B x T x C x H x W); less is better\n{caption}", path)


def scaling(run: dict[str, Any], caption: str, path: Path) -> None:
    """A column an axis: above the time of each implementation, below how many times faster ours is."""
    environment, rows = run["environment"], run["rows"]
    ours = environment["ours"]
    columns = {axis: along(rows, environment["base"], axis) for axis in (*AXES, "threads")}
    columns = {axis: found for axis, found in columns.items() if len(found) > 1}
    times = [key for key in rows[0] if key.endswith(" ms")]
    ratios = {"x authors": AUTHORS, "x reference": REFERENCE, "x composite": "composite"}
    ratios = {column: other for column, other in ratios.items() if other != ours}
    figure = Figure(figsize=(2.9 * len(columns) + 1.4, 6), layout="constrained")
    grid = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    for (axis, points), (above, below) in zip(columns.items(), grid.T, strict=True):
        sizes = [size(row, axis) for row in points]
        for key in times:
            name = key.removesuffix(" ms")
            above.plot(sizes, [row[key] for row in points], "o-", color=COLOURS[name], markersize=4)
        for column, other in ratios.items():
            below.plot(sizes, [row[column] for row in points], "o-", color=COLOURS[other], markersize=4)
        below.axhline(1, color=TEXT, linestyle="--", linewidth=1)
        above.set(xscale="log", yscale="log")
        above.yaxis.set_major_formatter("{x:g}")
        below.set(xlabel=NAMES[axis], xticks=sizes, xticklabels=[str(n) for n in sizes])
        below.xaxis.minorticks_off()
        for axes in (above, below):
            _plain(axes)
    grid[0, 0].set_ylabel("forward + backward, ms")
    grid[1, 0].set(ylabel=f"{ours}: times faster", ylim=(0, None))
    last = list(columns.values())[-1][-1]
    _label(grid[0, -1], {key.removesuffix(" ms"): (last[key], COLOURS[key.removesuffix(" ms")]) for key in times})
    _label(grid[1, -1], {f"than {other}": (last[column], COLOURS[other]) for column, other in ratios.items()})
    base = environment["base"]
    from_base = f"from B x T x C x H x W = {cell('', base['shape'])}, {base['dtype']}, {base['threads']} threads"
    _save(figure, f"refine in training, one size at a time {from_base}\n{caption}", path)


def along(rows: list[Row], base: Row, axis: str) -> list[Row]:
    """The rows that are the base but for `axis`, in its order."""

    def others(row: Row) -> list[Any]:
        shape = [n for name, n in zip("BTCHW", row["shape"], strict=True) if name != axis]
        return [shape, row["dtype"], row["layout"], None if axis == "threads" else row["threads"]]

    return sorted((row for row in rows if others(row) == others(base)), key=lambda row: size(row, axis))


def size(row: Row, axis: str) -> int:
    """Where on the axis a row stands."""
    return int(row["threads"] if axis == "threads" else row["shape"][AXES[axis]])


def _label(axes: Axes, ends: dict[str, tuple[float | None, str]]) -> None:
    """Names at the right ends of lines, (height, colour) each, moved apart where they would overlap."""
    there = [(value, colour, name) for name, (value, colour) in ends.items() if value is not None]
    low, high = axes.get_ylim()
    logarithmic = axes.get_yscale() == "log"
    least = -1.0
    for value, colour, name in sorted(there):
        height = log(value / low) / log(high / low) if logarithmic else (value - low) / (high - low)
        least = max(height, least + 0.075)
        axes.text(1.03, least, name, color=colour, transform=axes.transAxes, verticalalignment="center", fontsize=9)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT, labelsize=9)


def _save(figure: Figure, caption: str, path: Path) -> None:
    figure.supxlabel(caption, fontsize=8, color=TEXT, x=0.01, horizontalalignment="left")
    # Without the name and version of the software, the same rows give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
