"""Lower bound of the time of `refine`: its matrix products and compulsory memory traffic at a machine's own rates."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from benchmarks.harness import measure
from benchmarks.harness.shapes import DTYPES, Shape


def flops(shape: Shape, hidden: int, *, backward: bool) -> int:
    """Return the FLOPs of the products that the equations need for whole clips with inputs="appearance+motion".

    A step takes two products of 2 D C P B FLOPs, W_a A_t and W_m M_t. The first, t = 2, takes one, with W_a + W_m:
    S_1 = X_1 makes A_2 = M_2. The backward forms the gradients of the weights and of the inputs, each as many products
    as the forward with the same saving. The products of the attention are too small to count.
    """
    clips, frames, channels, height, width = shape
    product = 2 * hidden * channels * height * width * clips
    return max(2 * (frames - 1) - 1, 0) * product * (3 if backward else 1)


def size(shape: Shape, dtype: str, *, backward: bool) -> int:
    """Return the bytes that must move: the forward reads X and writes S, the backward reads X, S, dS and writes dX."""
    return prod(shape) * DTYPES[dtype].itemsize * (6 if backward else 2)


@dataclass(frozen=True)
class Rates:
    """Rates that a machine reaches in one dtype."""

    product: float
    """FLOP/s of PyTorch's fastest matrix product."""
    by: str
    """Its name, as in `measure.gemm_rates`."""
    copy: float
    """Bytes/s, read plus written."""

    def seconds(self, shape: Shape, hidden: int, dtype: str, *, backward: bool) -> float:
        """Return the least seconds of a forward, or of a forward and a backward."""
        arithmetic = flops(shape, hidden, backward=backward) / self.product
        return arithmetic + size(shape, dtype, backward=backward) / self.copy


def rates(shape: Shape, hidden: int, dtype: str, device: torch.device, copy: float) -> Rates:
    """Measure the product of all frames at once, W_m (D, C) with M (C, B T P); `copy` is taken as it is."""
    clips, frames, channels, height, width = shape
    by_name = measure.gemm_rates(clips * frames * height * width, channels, hidden, DTYPES[dtype], device)
    by = max(by_name, key=by_name.__getitem__)
    return Rates(by_name[by], by, copy)
