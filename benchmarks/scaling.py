"""Scaling of `refine`, forward with backward, over clips, frames, channels and threads, one at a time from a base.

    python -m benchmarks.scaling --json benchmarks/results/scaling-cpu-2core.json

Then the cases where a fused kernel has little to gain: one position, one clip of two frames, float64, channels-last
maps. Training mode, float32 except there. "x ..." is the speed-up of the backend that `backend="auto"` takes over
eager or composite, the median of paired rounds; below 1 ours is slower. Where parity fails the row has a dash, and the
run ends with an error.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import tyro

from benchmarks.harness import measure
from benchmarks.harness.results import BenchArgs, environment, write
from benchmarks.harness.shapes import AXES, Shape
from benchmarks.implementations.refine import AUTHORS, REFERENCE, filter_valid, implementations
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from rru_fast import backends


@dataclass
class Options(BenchArgs):
    """Measure the unit at several sizes."""

    base: Shape = (8, 8, 2048, 8, 8)
    """B T C H W of the maps, of which one size at a time is changed."""
    clips: tuple[int, ...] = (1, 2, 4, 8, 20)
    frames: tuple[int, ...] = (2, 4, 8, 16)
    channels: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    threads: tuple[int, ...] = (1, 2, 4)
    """Numbers above this machine's cores are left out. Everything else runs on PyTorch's number of threads."""
    repeats: int = 5
    """Rounds; each runs every implementation once."""


@dataclass(frozen=True)
class Point:
    """Shape, threads, dtype and layout of a row."""

    shape: Shape
    threads: int
    dtype: str = "float32"
    layout: str = "contiguous"


def main(options: Options) -> list[Row]:
    """Check parity and measure at each point, and print; returns the rows.

    Raises:
        SystemExit: at the end, after the rows are written: an implementation is wrong at a point, or does not run.
    """
    device = torch.device(options.device)
    base = Point(options.base, torch.get_num_threads())
    ours = backends.choose("auto", device)
    failed: list[str] = []
    rows: list[Row] = []
    for number, point in enumerate(chosen := points(base, options), 1):
        title = f"{table.cell('shape', point.shape)}, {point.dtype}, {point.layout}, {point.threads} threads"
        print(f"{number}/{len(chosen)}: {title}")
        row, refused = _row(point, ours, device, options.repeats)
        rows.append(row)
        failed += [f"{title}: {name}: {why}" for name, why in refused.items()]
    found = environment(device) | {"ours": ours}
    terminal.show("refine, training, forward + backward", found, rows)
    if options.json is not None:
        write(options.json, {**found, "op": "scaling", "base": asdict(base)}, rows)
    if failed:
        raise SystemExit("left out:\n  " + "\n  ".join(failed))
    return rows


def points(base: Point, options: Options) -> list[Point]:
    """Return every point once, axis by axis, the special cases last."""
    sizes = {"B": options.clips, "T": options.frames, "C": options.channels}
    found = [resized(base, **{axis: size}) for axis, axis_sizes in sizes.items() for size in axis_sizes]
    found += [replace(base, threads=n) for n in options.threads if n <= (os.cpu_count() or 1)]
    found += [
        base,
        replace(base, shape=(*base.shape[:3], 1, 1)),
        resized(base, B=1, T=2),
        replace(base, dtype="float64"),
        replace(base, layout="channels last"),
    ]
    return list(dict.fromkeys(found))


def resized(point: Point, **sizes: int) -> Point:
    """Return the point with other sizes on the axes named."""
    shape = list(point.shape)
    for axis, size in sizes.items():
        shape[AXES[axis]] = size
    return replace(point, shape=tuple(shape))  # type: ignore[arg-type]


def _row(point: Point, ours: str, device: torch.device, repeats: int) -> tuple[Row, dict[str, str]]:
    """Return the row of a point, and the reason for each implementation that is left out of it."""
    with _threads(point.threads):
        channels_last = point.layout == "channels last"
        impls = implementations(point.shape, point.dtype, device, channels_last=channels_last)
        valid, refused = filter_valid(impls)
        times = measure.paired({name: impl.step for name, impl in valid.items()}, repeats, warmup=1)
    row: dict[str, Any] = asdict(point)
    row |= {f"{name} ms": 1e3 * median(times[name]) if name in times else None for name in impls}
    for column, other in {"x authors": AUTHORS, "x reference": REFERENCE, "x composite": "composite"}.items():
        row[column] = measure.ratio(times[other], times[ours]) if {other, ours} <= times.keys() else None
    return row, refused


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
