"""Sizes, device and rounds of a section, and the precision of float32 that it is measured at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness import measure
from benchmarks.implementations.refine import HIDDEN, Shape
from benchmarks.reports.table import Row

WHY = "left out"
PRECISIONS = ("defaults", "high")

Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    maps: Shape = (20, 8, 2048, 8, 8)
    tracklet: Shape = (1, 675, 2048, 8, 8)
    features: tuple[int, int, int] = (8, 20, 2048)  # strips, clips, channels
    clips_per_identity: int = 4
    many: tuple[int, int] = (16384, 256)
    hidden: tuple[int, int] = HIDDEN
    calls: int = 5  # in a row, for a time
    draws: int = 5  # for parity of what is small: of a handful of roundings luck alone decides


TOY = Sizes((2, 2, 6, 3, 2), (1, 2, 6, 3, 2), (2, 4, 8), 2, (4, 8), (5, 4), 1, 3)


@dataclass(frozen=True)
class Run:
    """Arguments of every section."""

    sizes: Sizes
    device: torch.device
    copy: float  # bytes/s of the device's own copy
    repeats: int  # rounds; each runs every implementation once
    warmup: int


def make_run(device: torch.device, toy: bool, repeats: int) -> Run:
    """Measure the device's copy; a toy runs once, without warm-up."""
    copy = measure.copy_rate((4 if toy else 1024) * measure.MIB, device)
    return Run(TOY, device, copy, 1, 0) if toy else Run(Sizes(), device, copy, repeats, 2)


def set_float32(precision: str) -> None:
    """Set how a GPU multiplies float32.

    "defaults": convolutions in TF32, matmuls in fp32; "high": both in TF32; "exact": both in fp32.
    """
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    torch.backends.cudnn.allow_tf32 = precision != "exact"


def set_precision(precision: str, device: torch.device) -> None:
    """Call `set_float32`; on a CPU, where eager PyTorch has no TF32, have the interpreted kernels multiply in fp32."""
    if device.type == "cpu":
        os.environ.setdefault("RRU_FAST_FLOAT32", "ieee")
    else:
        set_float32(precision)


def times(works: Mapping[str, Work], run: Run) -> dict[str, list[float]]:
    """Seconds of one call, the mean of a few in a row, in each round."""
    calls = run.sizes.calls

    def in_a_row(work: Work) -> None:
        for _ in range(calls):
            work()

    runs = {name: partial(in_a_row, work) for name, work in works.items()}
    totals = measure.paired(runs, run.repeats, run.warmup)
    return {name: [total / calls for total in of_name] for name, of_name in totals.items()}


def faster(seconds: Mapping[str, list[float]], baseline: str, name: str) -> float | None:
    """Return the speed-up over the baseline; None where that was left out."""
    return measure.ratio(seconds[baseline], seconds[name]) if baseline in seconds else None


def left_out(refused: Mapping[str, str], shape: Sequence[int], precision: str) -> list[Row]:
    """Rows without figures, of implementations that do not run or are out of parity."""
    return [
        {"implementation": name, "shape": list(shape), "precision": precision, WHY: why}
        for name, why in refused.items()
    ]
