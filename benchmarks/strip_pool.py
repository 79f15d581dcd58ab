"""`strip_pool` against the eager mean, at the paper's shape unless told otherwise.

python -m benchmarks.strip_pool
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

import rru_fast
from benchmarks import measure, parity, table
from rru_fast import config


@dataclass
class Options:
    """What to measure."""

    shape: tuple[int, int, int, int, int] = (20, 8, 2048, 8, 8)
    """B T C H W of the maps."""
    repeats: int = 15
    """Rounds; each runs every implementation once."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """Where to write the rows."""


def main(options: Options) -> list[dict[str, Any]]:
    """Check parity, measure, print; returns the rows."""
    device = torch.device(options.device)
    s = torch.randn(options.shape, device=device)
    upstream = torch.randn(options.shape[0], *options.shape[2:4], device=device)

    def results(backend: str, s: Tensor) -> dict[str, Tensor]:
        leaf = s.detach().requires_grad_()
        return parity.gradients([rru_fast.strip_pool(leaf, backend=backend)], [upstream.to(s.dtype)], {"s": leaf})

    backends = {"eager" if name == "reference" else name: name for name in config.serving(device)}
    in_dtype, oracle = results("reference", s), results("reference", s.double())
    for name, backend in backends.items():
        parity.demand(name, results(backend, s), in_dtype, oracle)
    works = {name: lambda backend=backend: results(backend, s) for name, backend in backends.items()}
    times = measure.paired(works, options.repeats)
    rows = [
        {
            "implementation": name,
            "ms": 1e3 * median(times[name]),
            "x eager": measure.ratio(times["eager"], times[name]),
            "peak MiB": measure.peak_bytes(works[name], device) / measure.MIB,
        }
        for name in backends
    ]
    environment = measure.environment(device, s.dtype)
    shape = " x ".join(map(str, options.shape))
    table.show(f"strip_pool, {shape} (B x T x C x H x W), forward + backward", environment, rows)
    if options.json is not None:
        measure.write(options.json, {**environment, "op": "strip_pool", "shape": options.shape}, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
