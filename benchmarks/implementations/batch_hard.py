"""Implementations of `batch_hard_triplet`: eager, ours by each backend, and pytorch-metric-learning's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import rru_fast
from benchmarks.harness.parity import report_parity
from rru_fast import backends
from rru_fast.testing import compare, gradients

Loss = Callable[[Tensor, Tensor], Tensor]
PEER = "pytorch-metric-learning"
MARGIN = 0.4
CLIPS_PER_IDENTITY = 4


def batch(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random features (N, D) and their labels (N,)."""
    return torch.randn(n, d, device=device), torch.arange(n, device=device) // CLIPS_PER_IDENTITY


def eager(features: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of features ([G,] N, D) as it is commonly written: a loop over groups of a matrix form.

    Unlike the reference, it does not subtract the mean that all features share.
    """
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
    """Return the eager loss and that of every backend that serves the device, by name."""
    _, *fast = backends.serving(device, "batch_hard")
    found: dict[str, Loss] = {"eager": eager}
    return found | {name: rru_fast.BatchHardTripletLoss(MARGIN, backend=name) for name in fast}


def peer() -> Loss:
    """Return the loss of one group by pytorch-metric-learning."""
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    miner = BatchHardMiner()
    loss = TripletMarginLoss(margin=MARGIN, reducer=MeanReducer())
    # By default it normalizes features to unit length, which neither we nor the paper do.
    miner.distance.normalize_embeddings = loss.distance.normalize_embeddings = False

    def compute(features: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = loss(features, labels, miner(features, labels))
        return value

    return compute


def results(loss: Loss, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Run forward and backward; returns the loss and the gradient of the features."""
    leaf = features.detach().requires_grad_()
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
