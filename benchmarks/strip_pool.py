"""`strip_pool` against the eager mean, at the paper's shape by default.

python -m benchmarks.strip_pool
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import tyro

from benchmarks.harness import measure
from benchmarks.harness.results import BenchArgs, environment, write
from benchmarks.harness.shapes import Shape
from benchmarks.implementations.strip_pool import check, implementations, maps, results
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row


@dataclass
class Options(BenchArgs):
    """Measure strip pooling."""

    shape: Shape = (20, 8, 2048, 8, 8)
    """B T C H W of the maps."""
    repeats: int = 15
    """Rounds; each runs every implementation once."""


def main(options: Options) -> list[Row]:
    """Check parity, measure and print; returns the rows.

    Raises:
        SystemExit: one is wrong; nothing more is measured.
    """
    device = torch.device(options.device)
    torch.manual_seed(0)
    s, upstream = maps(options.shape, device)
    names = implementations(device)
    check(names, s, upstream)
    fns = {name: partial(results, backend, s, upstream) for name, backend in names.items()}
    times = measure.paired(fns, options.repeats)
    rows: list[Row] = [
        {
            "implementation": name,
            "ms": 1e3 * median(times[name]),
            "x eager": measure.ratio(times["eager"], times[name]),
            "peak MiB": measure.peak_bytes(fn, device) / measure.MIB,
        }
        for name, fn in fns.items()
    ]
    found = environment(device, s.dtype)
    shape = table.cell("shape", options.shape)
    terminal.show(f"strip_pool, {shape} (B x T x C x H x W), forward + backward", found, rows)
    if options.json is not None:
        write(options.json, {**found, "op": "strip_pool", "shape": options.shape}, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
