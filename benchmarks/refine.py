"""`refine` against eager PyTorch and torch.compile, at the paper's shape unless told otherwise.

    python -m benchmarks.refine
    python -m benchmarks.refine --shape 4 8 2048 8 8 --dtype bfloat16 --no-compile

Training: forward, and forward with backward, float32 and bfloat16 in the same rounds. Then, unless a shape or a dtype
is asked for, one whole tracklet in eval mode, forward only. `benchmarks.implementations.refine` says what the eager
rows are. Roofline, of forward with backward or in eval mode of forward: `benchmarks.harness.roofline`, at the rates in
the caption, measured in the same run.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import torch
import tyro

from benchmarks.harness import measure
from benchmarks.harness.roofline import Rates, rates
from benchmarks.implementations.refine import AUTHORS, COMPILED, REFERENCE, Contender, Shape, check, contenders
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from rru_fast import reference

PAPER: Shape = (20, 8, 2048, 8, 8)
TRACKLET = 675  # frames of the longest in PRID-2011


@dataclass
class Options(measure.Where):
    """What to measure."""

    shape: Shape | None = None
    """B T C H W of the maps: training alone, at this shape. Without it the paper's, and the tracklet."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Training alone, in this dtype. Without it float32 and bfloat16, and the tracklet."""
    tracklet: int | None = None
    """Frames of the tracklet, where it is to be another number than 675, or beside a shape or a dtype."""
    repeats: int = 7
    """Rounds; each runs every implementation once. The tracklet takes at most 5."""
    compile: bool = True
    """Also measure torch.compile of the eager module (its compilations take a minute or two)."""


def main(options: Options) -> list[Row]:
    """Check parity, measure, print; returns the rows."""
    device = torch.device(options.device)
    shape = options.shape or PAPER
    dtypes = [options.dtype] if options.dtype else ["float32", "bfloat16"]
    frames = options.tracklet or (None if options.shape or options.dtype else TRACKLET)
    # Entries of an earlier run in this process count towards the number after which the compiler gives up.
    torch.compiler.reset()

    hidden = reference.RRU(1, (1, 1)).transition.out_channels
    copy = measure.copy_rate(64 * measure.MIB, device)
    limits = {dtype: rates(shape, hidden, dtype, device, copy) for dtype in dtypes}
    products = [f"{limit.product / 1e9:.0f} GFLOP/s in {dtype} by {limit.by}" for dtype, limit in limits.items()]
    environment = measure.environment(device) | {"roofline": ", ".join([*products, f"{copy / 1e9:.0f} GB/s"])}

    rows = training(shape, limits, device, options)
    _show("training", environment, rows, "; saved: beside x, S and the parameters")
    if frames:
        rows += tracklet((1, frames, *shape[2:]), limits, device, min(options.repeats, 5))
        _show("eval, forward", environment, [row for row in rows if row["mode"] == "eval"])
    if options.json is not None:
        measure.write(options.json, {**environment, "op": "refine"}, rows)
    return rows


def training(shape: Shape, limits: dict[str, Rates], device: torch.device, options: Options) -> list[Row]:
    """Rows of all dtypes, measured in the same rounds, so that a ratio between dtypes is a paired one too."""
    field: dict[tuple[str, str], Contender] = {}
    for dtype in limits:
        own = contenders(shape, dtype, device)
        check(own)
        if options.compile:
            compiled = own[REFERENCE].twin(reference.RRU)
            own[COMPILED] = replace(compiled, module=torch.compile(compiled.module))  # type: ignore[arg-type]
        field |= {(name, dtype): contender for name, contender in own.items()}

    forwards = measure.paired({key: contender.forward for key, contender in field.items()}, options.repeats, warmup=1)
    steps = measure.paired({key: contender.step for key, contender in field.items()}, options.repeats, warmup=1)

    def step_ratio(key: tuple[str, str], baseline: tuple[str, str]) -> float | None:
        return measure.ratio(steps[baseline], steps[key]) if baseline in steps else None

    rows = []
    for key, contender in field.items():
        name, dtype = key
        hidden = contender.module.transition.out_channels
        roofline = limits[dtype].seconds(shape, hidden, dtype, backward=True)
        rows.append(
            {
                **_described(name, dtype, "training", shape),
                "forward ms": 1e3 * median(forwards[key]),
                "x authors": measure.ratio(forwards[AUTHORS, dtype], forwards[key]),
                "x reference": measure.ratio(forwards[REFERENCE, dtype], forwards[key]),
                "fwd+bwd ms": 1e3 * median(steps[key]),
                "x authors, fwd+bwd": step_ratio(key, (AUTHORS, dtype)),
                "x reference, fwd+bwd": step_ratio(key, (REFERENCE, dtype)),
                "x compile, fwd+bwd": step_ratio(key, (COMPILED, dtype)),
                "x float32, fwd+bwd": step_ratio(key, (name, "float32")),
                "% of roofline": 100 * roofline / median(steps[key]),
                "roofline ms": 1e3 * roofline,
                # A compiled module's saved tensors stay inside its graph.
                "saved MiB": None if name == COMPILED else _saved(contender) / measure.MIB,
                "peak MiB": measure.peak_bytes(contender.step, device) / measure.MIB,
            }
        )
    return rows


def tracklet(shape: Shape, limits: dict[str, Rates], device: torch.device, repeats: int) -> list[Row]:
    """Rows of a forward in eval mode, in float32 or in the one dtype asked for."""
    dtype, limit = next(iter(limits.items()))
    field = contenders(shape, dtype, device, training=False)
    check(field)
    times = measure.paired({name: contender.forward for name, contender in field.items()}, repeats, warmup=1)
    hidden = field[REFERENCE].module.transition.out_channels
    roofline = limit.seconds(shape, hidden, dtype, backward=False)
    return [
        {
            **_described(name, dtype, "eval", shape),
            "forward ms": 1e3 * median(times[name]),
            "x authors": measure.ratio(times[AUTHORS], times[name]),
            "x reference": measure.ratio(times[REFERENCE], times[name]),
            "% of roofline": 100 * roofline / median(times[name]),
            "roofline ms": 1e3 * roofline,
            "peak MiB": measure.peak_bytes(contender.forward, device) / measure.MIB,
        }
        for name, contender in field.items()
    ]


def _described(name: str, dtype: str, mode: str, shape: Shape) -> Row:
    threads = torch.get_num_threads()
    return {"implementation": name, "dtype": dtype, "mode": mode, "shape": list(shape), "threads": threads}


def _saved(contender: Contender) -> int:
    return measure.saved_bytes(lambda: contender.module(contender.x)[:2], [contender.x, *contender.module.parameters()])


def _show(what: str, environment: Row, rows: list[Row], notes: str = "") -> None:
    title = f"refine, {table.cell('shape', rows[0]['shape'])} (B x T x C x H x W), {what}"
    terminal.show(title, environment, rows, notes, hide=table.SHARED)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
