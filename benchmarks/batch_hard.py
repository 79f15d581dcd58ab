"""`batch_hard_triplet` against the eager matrix form and pytorch-metric-learning.

    python -m benchmarks.batch_hard
    python -m benchmarks.batch_hard --n 1024 --d 128

Forward with backward. Two shapes: N features of one group, and the paper's losses, L_v on 20 clips and L_p on their 8
strips of 2048 channels, where eager is a loop over strips. And the memory of N so large that the N x N matrix itself,
of which eager and the peer hold several, is out of proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

import rru_fast
from benchmarks import measure, parity, table
from rru_fast import config, reference

Loss = Callable[[Tensor, Tensor], Tensor]
MARGIN = 0.4
# Of the strips, calls to a measurement: one takes less than a millisecond, of which the caches and threads that the
# garbage collection before it has put to sleep would be half.
CALLS = 20


@dataclass
class Options:
    """What to measure."""

    n: int = 4096
    """Features in the large batch."""
    d: int = 256
    """Their width."""
    n_memory: int = 16384
    """Features where only memory is measured."""
    clips_a_person: int = 4
    repeats: int = 7
    """Rounds; each runs every implementation once."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """Where to write the rows."""


def main(options: Options) -> list[dict[str, Any]]:
    """Check parity, measure, print; returns the timed rows of both shapes."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    labels = torch.arange(options.n, device=device) // options.clips_a_person
    features = torch.randn(options.n, options.d, device=device)
    people = torch.arange(20, device=device) // 2
    strips = torch.randn(8, 20, 2048, device=device)

    def eager(features: Tensor, labels: Tensor) -> Tensor:
        groups = features if features.dim() == 3 else features[None]
        losses = [reference.batch_hard_triplet(group, labels, margin=MARGIN) for group in groups]
        return torch.stack(losses).mean()  # type: ignore[arg-type]

    losses: dict[str, Loss] = {"eager": eager}
    _, *backends = config.serving(device)
    losses |= {name: rru_fast.BatchHardTripletLoss(MARGIN, backend=name) for name in backends}
    large = _measure({**losses, "pytorch-metric-learning": _peer()}, features, labels, options.repeats, 1)
    small = _measure(losses, strips, people, options.repeats, CALLS)
    many = _memory(losses, options, device)
    environment = measure.environment(device, torch.float32)
    table.show(f"batch_hard_triplet, N {options.n}, D {options.d}, forward + backward", environment, large)
    table.show("batch_hard_triplet, 8 strips of 20 x 2048, forward + backward", environment, small)
    matrix = (
        f"; the {options.n_memory} x {options.n_memory} matrix alone: {4 * options.n_memory**2 / measure.MIB:.0f} MiB"
    )
    table.show(f"batch_hard_triplet, N {options.n_memory}, D {options.d}, memory", environment, many, matrix)
    if options.json is not None:
        shapes = {"large": [options.n, options.d], "strips": [8, 20, 2048], "memory": [options.n_memory, options.d]}
        tables = zip(shapes, (large, small, many), strict=True)
        rows = [{"shape": shape, **row} for shape, group in tables for row in group]
        measure.write(options.json, {**environment, "op": "batch_hard", "shapes": shapes}, rows)
    return large + small


def _peer() -> Loss:
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    miner = BatchHardMiner()
    loss = TripletMarginLoss(margin=MARGIN, reducer=MeanReducer())
    # Their distances are between unit vectors unless told otherwise; ours and the paper's are not.
    miner.distance.normalize_embeddings = loss.distance.normalize_embeddings = False

    def work(features: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = loss(features, labels, miner(features, labels))
        return value

    return work


def _measure(
    losses: dict[str, Loss], features: Tensor, labels: Tensor, repeats: int, calls: int
) -> list[dict[str, Any]]:
    """Rows of forward with backward, the mean of so many calls in a row."""

    def results(loss: Loss, features: Tensor) -> dict[str, Tensor]:
        leaf = _leaf(features)
        value = loss(leaf, labels)
        return parity.gradients([value], [torch.ones_like(value)], {"features": leaf})

    in_dtype, oracle = results(losses["eager"], features), results(losses["eager"], features.double())
    for name, loss in losses.items():
        parity.demand(name, results(loss, features), in_dtype, oracle)
    works = {name: lambda loss=loss: results(loss, features) for name, loss in losses.items()}
    runs = {name: lambda work=work: [work() for _ in range(calls)] for name, work in works.items()}
    times = measure.paired(runs, repeats)
    return [
        {
            "implementation": name,
            "ms": 1e3 * median(times[name]) / calls,
            "x eager": measure.ratio(times["eager"], times[name]),
            "saved MiB": measure.saved_bytes(lambda loss=loss: [loss(_leaf(features), labels)], [features])  # type: ignore[misc]
            / measure.MIB,
            "peak MiB": measure.peak_bytes(works[name], features.device) / measure.MIB,
        }
        for name, loss in losses.items()
    ]


def _memory(losses: dict[str, Loss], options: Options, device: torch.device) -> list[dict[str, Any]]:
    """What forward with backward holds beyond the features, the gradient included."""
    labels = torch.arange(options.n_memory, device=device) // options.clips_a_person
    leaf = _leaf(torch.randn(options.n_memory, options.d, device=device))
    return [
        {
            "implementation": name,
            "peak MiB": measure.peak_bytes(partial(_gradient, loss, leaf, labels), device) / measure.MIB,
        }
        for name, loss in losses.items()
        if name != "eager"
    ]


def _gradient(loss: Loss, leaf: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(leaf, labels), leaf)


def _leaf(features: Tensor) -> Tensor:
    return features.detach().requires_grad_()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
