"""`batch_hard_triplet` against the eager matrix form and pytorch-metric-learning.

    python -m benchmarks.batch_hard
    python -m benchmarks.batch_hard --n 1024 --d 128

Forward with backward. Two shapes: N features of one group, and the paper's losses, L_v on 20 clips and L_p on their 8
strips of 2048 channels, where eager is a loop over strips. `benchmarks.memory` has the memory of other N.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import rru_fast
from benchmarks.harness import measure
from benchmarks.harness.parity import report_parity
from benchmarks.reports import terminal
from benchmarks.reports.table import Row
from rru_fast import backends
from rru_fast.testing import compare, gradients

Loss = Callable[[Tensor, Tensor], Tensor]
PEER = "pytorch-metric-learning"
MARGIN = 0.4
CLIPS_A_PERSON = 4
# Of the strips, calls to a measurement: one takes less than a millisecond, of which the caches and threads that the
# garbage collection before it has put to sleep would be half.
CALLS = 20


@dataclass
class Options(measure.Where):
    """What to measure."""

    n: int = 4096
    """Features in the large batch."""
    d: int = 256
    """Their width."""
    repeats: int = 7
    """Rounds; each runs every implementation once."""


def main(options: Options) -> list[Row]:
    """Check parity, measure, print; returns the rows of both shapes.

    Raises:
        SystemExit: one is wrong; nothing more is measured.
    """
    device = torch.device(options.device)
    torch.manual_seed(0)
    features, labels = batch(options.n, options.d, device)
    people = torch.arange(20, device=device) // 2
    strips = torch.randn(8, 20, 2048, device=device)
    large = _measure(losses(device) | {PEER: peer()}, features, labels, options.repeats, 1)
    small = _measure(losses(device), strips, people, options.repeats, CALLS)
    environment = measure.environment(device, torch.float32)
    terminal.show(f"batch_hard_triplet, N {options.n}, D {options.d}, forward + backward", environment, large)
    terminal.show("batch_hard_triplet, 8 strips of 20 x 2048, forward + backward", environment, small)
    if options.json is not None:
        shapes = {"large": [options.n, options.d], "strips": [8, 20, 2048]}
        rows = [{"shape": shape, **row} for shape, group in zip(shapes, (large, small), strict=True) for row in group]
        measure.write(options.json, {**environment, "op": "batch_hard", "shapes": shapes}, rows)
    return large + small


def batch(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (N, D) at random and their labels (N,)."""
    return torch.randn(n, d, device=device), torch.arange(n, device=device) // CLIPS_A_PERSON


def eager(features: Tensor, labels: Tensor) -> Tensor:
    """The loss as it is commonly written, a loop over groups; the reference also subtracts what features share."""
    same = labels[:, None] == labels
    losses = []
    for f in features if features.dim() == 3 else features[None]:
        square = f.square().sum(-1)
        d = (square[:, None] + square - 2 * f @ f.T).clamp(min=1e-12).sqrt()
        d_pos = d.masked_fill(~same, float("-inf")).amax(-1)
        d_neg = d.masked_fill(same, float("inf")).amin(-1)
        losses.append(F.relu(MARGIN + d_pos - d_neg).mean())
    return torch.stack(losses).mean()


def losses(device: torch.device) -> dict[str, Loss]:
    """By name, the eager loss and that of every backend that can serve on the device."""
    _, *fast = backends.serving(device)
    found: dict[str, Loss] = {"eager": eager}
    return found | {name: rru_fast.BatchHardTripletLoss(MARGIN, backend=name) for name in fast}


def peer() -> Loss:
    """The same loss, of one group, out of pytorch-metric-learning."""
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


def results(loss: Loss, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Forward and backward: the loss and its gradient."""
    leaf = _leaf(features)
    value = loss(leaf, labels)
    return {"loss": value.detach(), **gradients([value], [torch.ones_like(value)], {"features": leaf})}


def check(losses: Mapping[str, Loss], features: Tensor, labels: Tensor) -> None:
    """Hold every loss to the eager one in float64.

    Raises:
        SystemExit: one is wrong.
    """
    eager = losses["eager"]
    in_dtype, oracle = results(eager, features, labels), results(eager, features.double(), labels)
    for name, loss in losses.items():
        report_parity(name, [compare(results(loss, features, labels), in_dtype, oracle)])


def _measure(losses: Mapping[str, Loss], features: Tensor, labels: Tensor, repeats: int, calls: int) -> list[Row]:
    """Rows of forward with backward, the mean of so many calls in a row."""
    check(losses, features, labels)
    works = {name: partial(results, loss, features, labels) for name, loss in losses.items()}
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


def _leaf(features: Tensor) -> Tensor:
    return features.detach().requires_grad_()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
