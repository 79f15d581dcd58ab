"""Drawings of measured runs: bars of time next to the roofline; time, speed-up and memory by size."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness.shapes import AXES
from benchmarks.implementations.refine import AUTHORS, REFERENCE
from benchmarks.reports import style
from benchmarks.reports.style import COLORS
from benchmarks.reports.table import Row, cell
from build_tools.palette import TEXT

# Index in the shape, and name, of the size in which the rows of `memory` differ, by operator.
MEMORY_AXES = {"refine": (1, "T, frames"), "batch_hard": (0, "N, features")}
NAMES = {"B": "B, clips", "T": "T, frames", "C": "C, channels", "threads": "threads"}


def refine(run: dict[str, Any], caption: str) -> Figure:
    """Draw a panel per mode and dtype: the time of each implementation, and the roofline's share of it."""

    def panel(row: Row) -> tuple[Any, ...]:
        return row["mode"], row["dtype"], tuple(row["shape"])

    panels = [(key, list(rows)) for key, rows in groupby(run["rows"], key=panel)]
    figure = Figure(figsize=(3.3 * len(panels) + 1.6, 3.6), layout="constrained")
    # A shared axis: an implementation has one height in all panels and is named once.
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, ((mode, dtype, shape), rows) in zip(grid, panels, strict=True):
        column, passes = ("fwd+bwd ms", "forward + backward") if mode == "training" else ("forward ms", "forward")
        times, names = [row[column] for row in rows], [row["implementation"] for row in rows]
        bars = axes.barh(names, times, color=[COLORS[name] for name in names], height=0.65)
        floor = rows[0]["roofline ms"]
        labels = [f"{cell('', time)} ms, {100 * floor / time:.0f} %" for time in times]
        axes.bar_label(bars, labels, padding=4, color=TEXT, fontsize=9)
        axes.axvline(floor, color=TEXT, linestyle="--", linewidth=1)
        above = axes.get_xaxis_transform()  # x in data coordinates, y in those of the panel
        axes.text(floor, 0.98, f" roofline {cell('', floor)} ms", color=TEXT, fontsize=9, transform=above, va="top")
        axes.set(xlim=(0, 1.5 * max(times)), xlabel=f"{passes}, ms")
        axes.set_title(f"{mode}, {dtype}\n{cell('', shape)}", fontsize=10, loc="left")
        style.simplify(axes)
    most = max(len(rows) for _, rows in panels)
    grid[0].set_ylim(most - 0.5, -1)  # the first row on top, below the roofline's name
    style.caption(figure, f"refine (B x T x C x H x W); less is better; %: of the roofline\n{caption}")
    return figure


def scaling(run: dict[str, Any], caption: str) -> Figure:
    """Draw a column per axis: the time of each implementation on top, the speed-up of ours at the bottom."""
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
            above.plot(sizes, [row[key] for row in points], "o-", color=COLORS[name], markersize=4)
        for column, other in ratios.items():
            below.plot(sizes, [row[column] for row in points], "o-", color=COLORS[other], markersize=4)
        below.axhline(1, color=TEXT, linestyle="--", linewidth=1)
        above.set(xscale="log", yscale="log")
        above.yaxis.set_major_formatter("{x:g}")
        below.set(xlabel=NAMES[axis], xticks=sizes, xticklabels=[str(n) for n in sizes])
        below.xaxis.minorticks_off()
        for axes in (above, below):
            style.simplify(axes)
    grid[0, 0].set_ylabel("forward + backward, ms")
    grid[1, 0].set(ylabel=f"{ours}: times faster", ylim=(0, None))
    last = list(columns.values())[-1][-1]
    style.label(grid[0, -1], {key.removesuffix(" ms"): (last[key], COLORS[key.removesuffix(" ms")]) for key in times})
    style.label(grid[1, -1], {f"than {other}": (last[column], COLORS[other]) for column, other in ratios.items()})
    base = environment["base"]
    from_base = f"from B x T x C x H x W = {cell('', base['shape'])}, {base['dtype']}, {base['threads']} threads"
    style.caption(figure, f"refine in training, one size at a time {from_base}\n{caption}")
    return figure


def memory(run: dict[str, Any], caption: str) -> Figure:
    """Draw a panel per operator: the peak of each implementation by the size in which its rows differ."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    grid = figure.subplots(1, 2)
    for axes, (op, group) in zip(grid, groupby(run["rows"], key=lambda row: row["op"]), strict=True):
        rows = list(group)
        axis, name = MEMORY_AXES[op]
        sizes = [row["shape"][axis] for row in rows]
        peaks = {key.removesuffix(" MiB"): [row[key] for row in rows] for key in rows[0] if key.endswith(" MiB")}
        for implementation, heights in peaks.items():
            axes.plot(sizes, heights, "o-", color=COLORS[implementation], markersize=4)
        axes.set(xscale="log", yscale="log", xlabel=name, xticks=sizes, xticklabels=[str(n) for n in sizes])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        shape = [*rows[0]["shape"][:axis], name[0], *rows[0]["shape"][axis + 1 :]]
        axes.set_title(f"{op}, {cell('shape', shape)}", fontsize=10, loc="left")
        style.label(axes, {key: (heights[-1], COLORS[key]) for key, heights in peaks.items()})
        style.simplify(axes)
    grid[0].set_ylabel("peak, MiB")
    style.caption(figure, f"forward + backward in training, memory beyond the inputs; less is better\n{caption}")
    return figure


def along(rows: list[Row], base: Row, axis: str) -> list[Row]:
    """Return the rows that equal the base except along `axis`, sorted by their size on it."""

    def others(row: Row) -> list[Any]:
        shape = [n for name, n in zip("BTCHW", row["shape"], strict=True) if name != axis]
        return [shape, row["dtype"], row["layout"], None if axis == "threads" else row["threads"]]

    return sorted((row for row in rows if others(row) == others(base)), key=lambda row: size(row, axis))


def size(row: Row, axis: str) -> int:
    """Return the size of a row on an axis: B, T, C or threads."""
    return int(row["threads"] if axis == "threads" else row["shape"][AXES[axis]])
