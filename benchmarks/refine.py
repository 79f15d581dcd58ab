"""`refine` against eager PyTorch and torch.compile, at the paper's shape by default.

    python -m benchmarks.refine
    python -m benchmarks.refine --shape 4 8 2048 8 8 --dtype bfloat16 --no-compile

Training: forward, and forward with backward, in float32 and bfloat16 in the same rounds. Then, unless a shape or a
dtype is given, one whole tracklet in eval mode, forward only. `benchmarks.implementations.refine` describes the two
eager rows. "% of roofline" is the share of the lower bound in `benchmarks.harness.roofline`, for the rates in the
caption, which are measured in the same run.
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
from benchmarks.harness.results import BenchArgs, environment, write
from benchmarks.harness.roofline import Rates, rates
from benchmarks.harness.shapes import Shape
from benchmarks.implementations.refine import AUTHORS, COMPILED, REFERENCE, Implementation, check, implementations
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from rru_fast import reference

PAPER: Shape = (20, 8, 2048, 8, 8)
TRACKLET = 675  # frames of the longest in PRID-2011


@dataclass
class Options(BenchArgs):
    """Measure the unit."""

    shape: Shape | None = None
    """B T C H W of the maps, to measure training alone; by default the paper's, and the tracklet."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Dtype, to measure training alone; by default float32 and bfloat16, and the tracklet."""
    tracklet: int | None = None
    """Frames of the tracklet; 675 by default, or no tracklet if a shape or a dtype is given."""
    repeats: int = 7
    """Rounds; each runs every implementation once. The tracklet takes at most 5."""
    compile: bool = True
    """Also measure torch.compile of the eager module (its compilations take a minute or two)."""


def main(options: Options) -> list[Row]:
    """Check parity, measure and print; returns the rows.

    Raises:
        SystemExit: one is wrong; nothing more is measured.
    """
    device = torch.device(options.device)
    shape = options.shape or PAPER
    dtypes = [options.dtype] if options.dtype else ["float32", "bfloat16"]
    frames = options.tracklet or (None if options.shape or options.dtype else TRACKLET)
    # Compilations of an earlier run in this process count toward the limit at which the compiler gives up.
    torch.compiler.reset()

    hidden = reference.RRU(1, (1, 1)).transition.out_channels
    copy = measure.copy_rate(64 * measure.MIB, device)
    limits = {dtype: rates(shape, hidden, dtype, device, copy) for dtype in dtypes}
    products = [f"{limit.product / 1e9:.0f} GFLOP/s in {dtype} by {limit.by}" for dtype, limit in limits.items()]
    found = environment(device) | {"roofline": ", ".join([*products, f"{copy / 1e9:.0f} GB/s"])}

    rows = training(shape, limits, device, options)
    _show("training", found, rows, "; saved: without x, S and the parameters")
    if frames:
        rows += tracklet((1, frames, *shape[2:]), limits, device, min(options.repeats, 5))
        _show("eval, forward", found, [row for row in rows if row["mode"] == "eval"])
    if options.json is not None:
        write(options.json, {**found, "op": "refine"}, rows)
    return rows


def training(shape: Shape, limits: dict[str, Rates], device: torch.device, options: Options) -> list[Row]:
    """Return the rows of all dtypes, measured in the same rounds, so that ratios between dtypes are paired too."""
    impls: dict[tuple[str, str], Implementation] = {}
    for dtype in limits:
        of_dtype = implementations(shape, dtype, device)
        check(of_dtype)
        if options.compile:
            compiled = of_dtype[REFERENCE].twin(reference.RRU)
            of_dtype[COMPILED] = replace(compiled, module=torch.compile(compiled.module))  # type: ignore[arg-type]
        impls |= {(name, dtype): impl for name, impl in of_dtype.items()}

    forwards = measure.paired({key: impl.forward for key, impl in impls.items()}, options.repeats, warmup=1)
    steps = measure.paired({key: impl.step for key, impl in impls.items()}, options.repeats, warmup=1)

    def step_ratio(key: tuple[str, str], baseline: tuple[str, str]) -> float | None:
        return measure.ratio(steps[baseline], steps[key]) if baseline in steps else None

    rows = []
    for key, impl in impls.items():
        name, dtype = key
        hidden = impl.module.transition.out_channels
        roofline = limits[dtype].seconds(shape, hidden, dtype, backward=True)
        rows.append(
            {
                **_description(name, dtype, "training", shape),
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
                # A compiled module saves its tensors inside its graph, out of reach of the hooks.
                "saved MiB": None if name == COMPILED else _saved_bytes(impl) / measure.MIB,
                "peak MiB": measure.peak_bytes(impl.step, device) / measure.MIB,
            }
        )
    return rows


def tracklet(shape: Shape, limits: dict[str, Rates], device: torch.device, repeats: int) -> list[Row]:
    """Return the rows of a forward in eval mode, in float32 or in the one dtype given."""
    dtype, limit = next(iter(limits.items()))
    impls = implementations(shape, dtype, device, training=False)
    check(impls)
    times = measure.paired({name: impl.forward for name, impl in impls.items()}, repeats, warmup=1)
    hidden = impls[REFERENCE].module.transition.out_channels
    roofline = limit.seconds(shape, hidden, dtype, backward=False)
    return [
        {
            **_description(name, dtype, "eval", shape),
            "forward ms": 1e3 * median(times[name]),
            "x authors": measure.ratio(times[AUTHORS], times[name]),
            "x reference": measure.ratio(times[REFERENCE], times[name]),
            "% of roofline": 100 * roofline / median(times[name]),
            "roofline ms": 1e3 * roofline,
            "peak MiB": measure.peak_bytes(impl.forward, device) / measure.MIB,
        }
        for name, impl in impls.items()
    ]


def _description(name: str, dtype: str, mode: str, shape: Shape) -> Row:
    threads = torch.get_num_threads()
    return {"implementation": name, "dtype": dtype, "mode": mode, "shape": list(shape), "threads": threads}


def _saved_bytes(impl: Implementation) -> int:
    return measure.saved_bytes(lambda: impl.module(impl.x)[:2], [impl.x, *impl.module.parameters()])


def _show(mode: str, environment: Row, rows: list[Row], notes: str = "") -> None:
    title = f"refine, {table.cell('shape', rows[0]['shape'])} (B x T x C x H x W), {mode}"
    terminal.show(title, environment, rows, notes, hide=table.SHARED)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
