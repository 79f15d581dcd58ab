"""`strip_pool` against the eager mean, at the paper's shape unless told otherwise.

python -m benchmarks.strip_pool
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import tyro
from torch import Tensor

import rru_fast
from benchmarks.harness import measure
from benchmarks.harness.parity import report_parity
from benchmarks.implementations.refine import Shape
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from rru_fast import backends
from rru_fast.testing import compare, gradients


@dataclass
class Options(measure.Where):
    """What to measure."""

    shape: Shape = (20, 8, 2048, 8, 8)
    """B T C H W of the maps."""
    repeats: int = 15
    """Rounds; each runs every implementation once."""


def main(options: Options) -> list[Row]:
    """Check parity, measure, print; returns the rows.

    Raises:
        SystemExit: one is wrong; nothing more is measured.
    """
    device = torch.device(options.device)
    torch.manual_seed(0)
    s, upstream = maps(options.shape, device)
    names = implementations(device)
    check(names, s, upstream)
    works = {name: partial(results, backend, s, upstream) for name, backend in names.items()}
    times = measure.paired(works, options.repeats)
    rows: list[Row] = [
        {
            "implementation": name,
            "ms": 1e3 * median(times[name]),
            "x eager": measure.ratio(times["eager"], times[name]),
            "peak MiB": measure.peak_bytes(work, device) / measure.MIB,
        }
        for name, work in works.items()
    ]
    environment = measure.environment(device, s.dtype)
    shape = table.cell("shape", options.shape)
    terminal.show(f"strip_pool, {shape} (B x T x C x H x W), forward + backward", environment, rows)
    if options.json is not None:
        measure.write(options.json, {**environment, "op": "strip_pool", "shape": options.shape}, rows)
    return rows


def maps(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Maps S (B, T, C, H, W) and the gradient of their strips (B, C, H), at random."""
    clips, _, channels, height, _ = shape
    return torch.randn(shape, device=device), torch.randn(clips, channels, height, device=device)


def implementations(device: torch.device) -> dict[str, str]:
    """By its name here, every backend that can serve on the device; the reference is the eager mean."""
    return {"eager" if name == "reference" else name: name for name in backends.serving(device)}


def results(backend: str, s: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Forward and backward: the strips and the gradient of the maps."""
    leaf = s.detach().requires_grad_()
    strips = rru_fast.strip_pool(leaf, backend=backend)
    return {"strips": strips.detach(), **gradients([strips], [upstream.to(s.dtype)], {"s": leaf})}


def check(backends: Mapping[str, str], s: Tensor, upstream: Tensor) -> None:
    """Hold every backend to the eager mean in float64.

    Raises:
        SystemExit: one is wrong.
    """
    in_dtype, oracle = results("reference", s, upstream), results("reference", s.double(), upstream)
    for name, backend in backends.items():
        report_parity(name, [compare(results(backend, s, upstream), in_dtype, oracle)])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
