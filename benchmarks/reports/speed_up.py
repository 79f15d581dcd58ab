"""Drawing of the kernels' speed-ups over PyTorch at every shape measured on one machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.implementations.refine import AUTHORS, COMPILED, REFERENCE
from benchmarks.reports import style
from benchmarks.reports.table import Row, cell
from build_tools.palette import TEXT

Ratios = dict[str, float | None]
"""Speed-ups over other implementations, by their names."""
OURS = ("cuda", "triton", "cpu", "composite")  # fastest first
TICKS = (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100)


def draw(runs: Sequence[dict[str, Any]], caption: str) -> Figure:
    """Draw a line per shape with a dot for each implementation that ours is compared with."""
    found = lines(runs)
    figure = Figure(figsize=(9, 0.26 * len(found) + 1.7), layout="constrained")
    axes = figure.subplots()
    heights = range(len(found))
    axes.hlines(heights, 0, 1, transform=axes.get_yaxis_transform(), color="#E5E5E5", linewidth=1, zorder=0)
    for other in (AUTHORS, COMPILED, REFERENCE):
        dots = [(ratios[other], height) for height, (_, ratios) in enumerate(found) if ratios.get(other)]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", color=style.COLORS[other], label=f"than {other}")
    for height, (_, ratios) in enumerate(found):
        number = cell("x ", ratios[REFERENCE])
        axes.text(1.02, height, number, transform=axes.get_yaxis_transform(), va="center", color=TEXT, fontsize=9)
    axes.axvline(1, color=TEXT, linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="times faster; the number: than eager, reference", ylim=(len(found) - 0.5, -0.5))
    axes.set_yticks(heights, [name for name, _ in found])
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.minorticks_off()
    style.simplify(axes)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    conditions = "forward + backward, in eval forward; float32 unless said"
    shapes = "maps: B x T x C x H x W, features: [G x] N x D"
    style.caption(figure, f"{conditions}; {shapes}\n{caption}")
    return figure


def lines(runs: Sequence[dict[str, Any]]) -> list[tuple[str, Ratios]]:
    """Return the label of each shape and the speed-ups of ours at it."""
    return [line for run in runs for line in LINES[run["environment"]["op"]](run)]


def _refine(run: dict[str, Any]) -> Iterator[tuple[str, Ratios]]:
    columns = {AUTHORS: "x authors", REFERENCE: "x reference", COMPILED: "x compile"}
    for row in _ours(run):
        suffix = ", fwd+bwd" if row["mode"] == "training" else ""
        name = f"refine, {row['mode']}, {cell('shape', row['shape'])}, {row['dtype']}"
        yield name, {other: row.get(column + suffix) for other, column in columns.items()}


def _scaling(run: dict[str, Any]) -> Iterator[tuple[str, Ratios]]:
    base = run["environment"]["base"]
    for row in run["rows"]:
        changed = [f", {row[key]}" for key in ("dtype", "layout") if row[key] != base[key]]
        changed += [f", threads {row['threads']}"] * (row["threads"] != base["threads"])
        name = f"refine, training, {cell('shape', row['shape'])}{''.join(changed)}"
        yield name, {AUTHORS: row["x authors"], REFERENCE: row["x reference"]}


def _operator(run: dict[str, Any]) -> Iterator[tuple[str, Ratios]]:
    environment = run["environment"]
    for row in _ours(run):
        if "x eager" in row:
            shape = row.get("shape", environment.get("shape"))
            shape = environment["shapes"][shape] if isinstance(shape, str) else shape
            yield f"{environment['op']}, {cell('shape', shape)}", {REFERENCE: row["x eager"]}


def _ours(run: dict[str, Any]) -> list[Row]:
    """Return the rows of the fastest backend that was measured."""
    names = {row["implementation"] for row in run["rows"]}
    ours = next(name for name in OURS if name in names)
    return [row for row in run["rows"] if row["implementation"] == ours]


LINES = {"refine": _refine, "scaling": _scaling, "batch_hard": _operator, "strip_pool": _operator}
