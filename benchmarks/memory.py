"""Memory of forward with backward: of `refine` by frames, of `batch_hard_triplet` by features.

    python -m benchmarks.memory --json benchmarks/results/memory-cpu-2core.json

Peak memory beyond the inputs, gradients included. On a CPU the figures depend only on the number of threads, so nothing
is repeated and the machine may be busy. Parity is checked first at every size.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

from dataclasses import dataclass
from functools import partial

import torch
import tyro

from benchmarks.harness import measure
from benchmarks.harness.results import BenchArgs, environment, write
from benchmarks.harness.shapes import Shape
from benchmarks.implementations import batch_hard, refine
from benchmarks.reports import terminal
from benchmarks.reports.table import Row


@dataclass
class Options(BenchArgs):
    """Measure peak memory."""

    maps: Shape = (8, 8, 2048, 8, 8)
    """B T C H W of the maps, with T replaced by each of `frames`."""
    frames: tuple[int, ...] = (2, 4, 8, 16, 32)
    features: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Numbers of features."""
    d: int = 256
    """Their width."""


def main(options: Options) -> list[Row]:
    """Check parity and measure at each size, and print; returns the rows, those of `refine` first.

    Raises:
        SystemExit: one is wrong; nothing more is measured.
    """
    device = torch.device(options.device)
    clips, _, *sizes = options.maps
    of_refine = [_refine((clips, frames, *sizes), device) for frames in options.frames]  # type: ignore[arg-type]
    of_batch_hard = [_batch_hard(n, options.d, device) for n in options.features]
    found = environment(device, torch.float32)
    terminal.show("refine, training, forward + backward, peak MiB", found, of_refine, hide=["op"])
    terminal.show("batch_hard_triplet, forward + backward, peak MiB", found, of_batch_hard, hide=["op"])
    if options.json is not None:
        write(options.json, {**found, "op": "memory"}, of_refine + of_batch_hard)
    return of_refine + of_batch_hard


def _refine(shape: Shape, device: torch.device) -> Row:
    impls = refine.implementations(shape, "float32", device)
    refine.check(impls)
    peaks = {f"{name} MiB": measure.peak_bytes(impl.step, device) / measure.MIB for name, impl in impls.items()}
    return {"op": "refine", "shape": list(shape), **peaks}


def _batch_hard(n: int, d: int, device: torch.device) -> Row:
    torch.manual_seed(0)
    features, labels = batch_hard.batch(n, d, device)
    losses = batch_hard.losses(device) | {batch_hard.PEER: batch_hard.peer()}
    batch_hard.check(losses, features, labels)
    fns = {name: partial(batch_hard.results, loss, features, labels) for name, loss in losses.items()}
    peaks = {f"{name} MiB": measure.peak_bytes(fn, device) / measure.MIB for name, fn in fns.items()}
    return {"op": "batch_hard", "shape": [n, d], **peaks}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
