"""`batch_hard_triplet` against the eager matrix form and pytorch-metric-learning.

    python -m benchmarks.batch_hard
    python -m benchmarks.batch_hard --n 1024 --d 128

Forward with backward, at two shapes: N features in one group, and the paper's losses, L_v of 20 clips and L_p of their
8 strips with 2048 channels, where eager loops over strips. `benchmarks.memory` measures the memory at other N.
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

from benchmarks.harness import measure
from benchmarks.harness.results import BenchArgs, environment, write
from benchmarks.implementations.batch_hard import PEER, Loss, batch, check, losses, peer, results
from benchmarks.reports import terminal
from benchmarks.reports.table import Row

# Calls per measurement of the strips: one takes less than a millisecond, half of which would be caches and threads that
# the preceding garbage collection has cooled.
CALLS = 20


@dataclass
class Options(BenchArgs):
    """Measure the triplet loss."""

    n: int = 4096
    """Features in the large batch."""
    d: int = 256
    """Their width."""
    repeats: int = 7
    """Rounds; each runs every implementation once."""


def main(options: Options) -> list[Row]:
    """Check parity, measure and print; returns the rows of both shapes.

    Raises:
        SystemExit: one is wrong; nothing more is measured.
    """
    device = torch.device(options.device)
    torch.manual_seed(0)
    features, labels = batch(options.n, options.d, device)
    of_strips = torch.arange(20, device=device) // 2
    strips = torch.randn(8, 20, 2048, device=device)
    large = _measure(losses(device) | {PEER: peer()}, features, labels, options.repeats, 1)
    small = _measure(losses(device), strips, of_strips, options.repeats, CALLS)
    found = environment(device, torch.float32)
    terminal.show(f"batch_hard_triplet, N {options.n}, D {options.d}, forward + backward", found, large)
    terminal.show("batch_hard_triplet, 8 strips of 20 x 2048, forward + backward", found, small)
    if options.json is not None:
        shapes = {"large": [options.n, options.d], "strips": [8, 20, 2048]}
        rows = [{"shape": shape, **row} for shape, group in zip(shapes, (large, small), strict=True) for row in group]
        write(options.json, {**found, "op": "batch_hard", "shapes": shapes}, rows)
    return large + small


def _measure(losses: Mapping[str, Loss], features: Tensor, labels: Tensor, repeats: int, calls: int) -> list[Row]:
    """Return the rows of forward with backward, each time the mean of `calls` calls."""
    check(losses, features, labels)
    fns = {name: partial(results, loss, features, labels) for name, loss in losses.items()}
    repeated = {name: lambda fn=fn: [fn() for _ in range(calls)] for name, fn in fns.items()}
    times = measure.paired(repeated, repeats)
    return [
        {
            "implementation": name,
            "ms": 1e3 * median(times[name]) / calls,
            "x eager": measure.ratio(times["eager"], times[name]),
            "saved MiB": _saved_bytes(loss, features, labels) / measure.MIB,
            "peak MiB": measure.peak_bytes(fns[name], features.device) / measure.MIB,
        }
        for name, loss in losses.items()
    ]


def _saved_bytes(loss: Loss, features: Tensor, labels: Tensor) -> int:
    return measure.saved_bytes(lambda: [loss(features.detach().requires_grad_(), labels)], [features])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
