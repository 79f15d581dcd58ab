"""A training step with the library's operators against one with their plain PyTorch twins, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from rich.table import Table
from torch import Tensor, nn

import rru_fast
from training.config.recipe import Recipe
from training.engine.build import make_optimizer
from training.model.losses import Losses
from training.model.network import Network

PAIRS, WARM_UP = 9, 2


@dataclass(frozen=True)
class Timing:
    """The same work done both ways, in turns; medians over the pairs.

    work: what was timed.
    fast, reference: milliseconds.
    ratio: median over pairs of fast / reference: below 1 the library is faster.
    """

    work: str
    fast: float
    reference: float
    ratio: float


def compare_ops(network: Network, recipe: Recipe, frames: Tensor, labels: Tensor) -> list[Timing]:
    """Time a whole training step and, where there is an RRU, its forward and backward alone.

    Args:
        network: copied, and left as it is.
        recipe: what it was made by.
        frames: (B, T, 3, h, w), a batch on the network's device.
        labels: (B,), on the same device.
    """
    clips, times = frames.shape[:2]
    reference = _Step(recipe, network.identities, frames, labels)
    reference.network.load_state_dict(network.state_dict())
    fast = rru_fast.accelerate(deepcopy(reference))
    timings = [_compare(f"training step, {clips}x{times} frames", fast, reference)]
    if fast.network.rru is not None and reference.network.rru is not None:
        c, (h, w) = network.backbone.channels, network.backbone.spatial
        maps = torch.rand(clips, times, c, h, w, device=frames.device, requires_grad=True)
        alone = [partial(_forward_backward, rru, maps) for rru in (fast.network.rru, reference.network.rru)]
        timings.append(_compare(f"its RRU alone, {clips}x{times}x{c}x{h}x{w}", *alone))
    return timings


def timing_table(timings: list[Timing]) -> Table:
    """A table of timings for people."""
    table = Table("forward and backward", title="ops fast against reference", title_justify="left")
    for column in ("fast", "reference", "fast / reference"):
        table.add_column(column, justify="right")
    for timing in timings:
        table.add_row(timing.work, f"{timing.fast:.1f} ms", f"{timing.reference:.1f} ms", f"{timing.ratio:.2f}")
    return table


class _Step(nn.Module):
    """A training step on one batch, with plain PyTorch operators until they are swapped."""

    def __init__(self, recipe: Recipe, people: int, frames: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.network = Network(replace(recipe.model, weights="random"), people, "reference").to(frames.device)
        self.losses = Losses(recipe.loss, "reference")
        self.optimizer = make_optimizer(self.network, recipe.optim)
        self.batch = frames, labels

    def forward(self) -> None:
        frames, labels = self.batch
        self.optimizer.zero_grad()
        self.losses(self.network(frames), labels)[0].backward()
        self.optimizer.step()


def _forward_backward(rru: nn.Module, maps: Tensor) -> None:
    refined = rru(maps)
    torch.autograd.backward([refined.features.mean(), refined.strips.mean()])


def _compare(work: str, fast: Callable[[], None], reference: Callable[[], None]) -> Timing:
    pairs = []
    for number in range(WARM_UP + PAIRS):
        # In turns, so that neither always goes first.
        if number % 2:
            pairs.append((_milliseconds(fast), _milliseconds(reference)))
        else:
            pairs.append((_milliseconds(reference), _milliseconds(fast))[::-1])
    measured = pairs[WARM_UP:]
    fast_ms, reference_ms = (median(times) for times in zip(*measured, strict=True))
    return Timing(work, fast_ms, reference_ms, median(f / r for f, r in measured))


def _milliseconds(run: Callable[[], None]) -> float:
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return 1e3 * (time.perf_counter() - started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
