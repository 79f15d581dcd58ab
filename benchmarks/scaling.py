"""How `refine`, forward with backward, scales: over clips, frames, channels and threads, one at a time from a base.

    python -m benchmarks.scaling --json benchmarks/results/scaling-cpu-2core.json

Then the shapes where a fused kernel has little to win: one position, one clip of two frames, float64, maps stored
channels last. Training mode, float32 but there. "x ..." is how many times faster the backend that `backend="auto"`
takes is than that row's eager or composite, the median of paired rounds; below 1 we lose. Where parity fails, a dash,
and the run ends with an error.
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
from benchmarks.implementations.refine import AUTHORS, REFERENCE, Shape, contenders, sifted
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from rru_fast import backends

AXES = {"B": 0, "T": 1, "C": 2}  # where in the shape


@dataclass
class Options(measure.Where):
    """What to measure."""

    base: Shape = (8, 8, 2048, 8, 8)
    """B T C H W of the maps from which one size at a time is changed."""
    clips: tuple[int, ...] = (1, 2, 4, 8, 20)
    frames: tuple[int, ...] = (2, 4, 8, 16)
    channels: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    threads: tuple[int, ...] = (1, 2, 4)
    """Numbers above this machine's cores are left out. All else runs on as many threads as PyTorch takes."""
    repeats: int = 5
    """Rounds; each runs every implementation once."""


@dataclass(frozen=True)
class Point:
    """What is varied."""

    shape: Shape
    threads: int
    dtype: str = "float32"
    layout: str = "contiguous"


def main(options: Options) -> list[Row]:
    """At each point check parity, then measure what passed; print and return the rows.

    Raises:
        SystemExit: at the end, with what was measured written: something is wrong at a point, or does not run.
    """
    device = torch.device(options.device)
    base = Point(options.base, torch.get_num_threads())
    ours = backends.choose("auto", device)
    failed: list[str] = []
    rows = [_row(point, ours, device, options.repeats, failed) for point in points(base, options)]
    environment = measure.environment(device) | {"ours": ours}
    terminal.show("refine, training, forward + backward", environment, rows)
    if options.json is not None:
        measure.write(options.json, {**environment, "op": "scaling", "base": asdict(base)}, rows)
    if failed:
        raise SystemExit("left out:\n  " + "\n  ".join(failed))
    return rows


def points(base: Point, options: Options) -> list[Point]:
    """Every point once, axis by axis, the odd ones last."""
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
    """The point with other sizes of the axes named."""
    shape = list(point.shape)
    for axis, size in sizes.items():
        shape[AXES[axis]] = size
    return replace(point, shape=tuple(shape))  # type: ignore[arg-type]


def _row(point: Point, ours: str, device: torch.device, repeats: int, failed: list[str]) -> Row:
    """The row of a point; what is left out of it is added to `failed`."""
    with _threads(point.threads):
        where = f"{table.cell('shape', point.shape)}, {point.dtype}, {point.layout}, {point.threads} threads"
        print(where)
        field = contenders(point.shape, point.dtype, device, channels_last=point.layout == "channels last")
        right, refused = sifted(field)
        failed += [f"{where}: {name}: {why}" for name, why in refused.items()]
        times = measure.paired({name: own.step for name, own in right.items()}, repeats, warmup=1)
    row: dict[str, Any] = asdict(point)
    row |= {f"{name} ms": 1e3 * median(times[name]) if name in times else None for name in field}
    for column, other in {"x authors": AUTHORS, "x reference": REFERENCE, "x composite": "composite"}.items():
        row[column] = measure.ratio(times[other], times[ours]) if {other, ours} <= times.keys() else None
    return row


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
