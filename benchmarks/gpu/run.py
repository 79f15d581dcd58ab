"""Sizes, device, rounds and float32 precision of a section."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness import measure
from benchmarks.harness.measure import Fn
from benchmarks.harness.shapes import Shape
from benchmarks.implementations.refine import HIDDEN
from benchmarks.reports.table import Row

WHY = "left out"  # column of the reason why a row has no figures
PRECISIONS = ("defaults", "high")


@dataclass(frozen=True)
class Sizes:
    """Shapes of a run."""

    maps: Shape = (20, 8, 2048, 8, 8)
    tracklet: Shape = (1, 675, 2048, 8, 8)
    features: tuple[int, int, int] = (8, 20, 2048)  # strips, clips, channels
    clips_per_identity: int = 4
    many: tuple[int, int] = (16384, 256)
    queries: int = 1024  # features whose partners are mined in a gallery of many
    hidden: tuple[int, int] = HIDDEN
    calls: int = 5  # per time
    draws: int = 5  # for parity of small tensors: chance decides the rounding of a single draw


TOY = Sizes((2, 2, 6, 3, 2), (1, 2, 6, 3, 2), (2, 4, 8), 2, (4, 8), 3, (5, 4), 1, 3)


@dataclass(frozen=True)
class Run:
    """Arguments of every section."""

    sizes: Sizes
    device: torch.device
    copy: float  # bytes/s, read plus written, of a copy on the device
    repeats: int  # rounds; each runs every implementation once
    warmup: int


def make_run(device: torch.device, toy: bool, repeats: int) -> Run:
    """Measure the device's copy rate and return a run; a toy has one round, without warm-up."""
    copy = measure.copy_rate((4 if toy else 1024) * measure.MIB, device)
    return Run(TOY, device, copy, 1, 0) if toy else Run(Sizes(), device, copy, repeats, 2)


def set_float32(precision: str) -> None:
    """Set the precision of a GPU's fp32 products.

    "defaults": convolutions in TF32, matmuls in fp32; "high": both in TF32; "exact": both in fp32.
    """
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    torch.backends.cudnn.allow_tf32 = precision != "exact"


def set_precision(precision: str, device: torch.device) -> None:
    """Call `set_float32`; on a CPU, where eager PyTorch has no TF32, make the interpreted kernels multiply in fp32."""
    if device.type == "cpu":
        os.environ.setdefault("RRU_FAST_FLOAT32", "ieee")
    else:
        set_float32(precision)


def times(fns: Mapping[str, Fn], run: Run) -> dict[str, list[float]]:
    """Return the seconds of one call, the mean of a few in a row, in each round."""
    calls = run.sizes.calls

    def repeat(fn: Fn) -> None:
        for _ in range(calls):
            fn()

    repeated = {name: partial(repeat, fn) for name, fn in fns.items()}
    totals = measure.paired(repeated, run.repeats, run.warmup)
    return {name: [total / calls for total in of_name] for name, of_name in totals.items()}


def speed_up(seconds: Mapping[str, list[float]], baseline: str, name: str) -> float | None:
    """Return the speed-up over the baseline, None if that was left out."""
    return measure.ratio(seconds[baseline], seconds[name]) if baseline in seconds else None


def left_out(refused: Mapping[str, str], shape: Sequence[int], precision: str) -> list[Row]:
    """Return rows without figures for implementations that do not run or are wrong."""
    return [
        {"implementation": name, "shape": list(shape), "precision": precision, WHY: why}
        for name, why in refused.items()
    ]
