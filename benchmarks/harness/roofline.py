"""What `refine` cannot beat on a machine: its matrix products and its compulsory bytes, at that machine's own rates."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from benchmarks.harness import measure
from benchmarks.implementations.refine import DTYPES, Shape


def flops(shape: Shape, hidden: int, *, backward: bool) -> int:
    """FLOPs of the products that the equations need for a clip from its beginning, inputs="appearance+motion".

    A step takes two products of 2 D C P B FLOPs, W_a A_t and W_m M_t, except the first, t = 2: there S_1 = X_1 makes
    A_2 = M_2, and one product with W_a + W_m is enough. The backward has the weights' gradients and the inputs' to
    form, each as many products as the forward and with the same saving. The attention's products are too small to
    count.
    """
    clips, frames, channels, height, width = shape
    product = 2 * hidden * channels * height * width * clips
    return max(2 * (frames - 1) - 1, 0) * product * (3 if backward else 1)


def size(shape: Shape, dtype: str, *, backward: bool) -> int:
    """Bytes that must move: the forward reads X and writes S, the backward reads X, S and dS and writes dX."""
    return prod(shape) * DTYPES[dtype].itemsize * (6 if backward else 2)


@dataclass(frozen=True)
class Rates:
    """What a machine reaches in one dtype."""

    product: float
    """FLOP/s of the fastest matrix product that PyTorch has here."""
    by: str
    """Whose it is."""
    copy: float
    """Bytes/s, read and written."""

    def seconds(self, shape: Shape, hidden: int, dtype: str, *, backward: bool) -> float:
        """The least time of a forward, or of a forward and a backward."""
        arithmetic = flops(shape, hidden, backward=backward) / self.product
        return arithmetic + size(shape, dtype, backward=backward) / self.copy


def rates(shape: Shape, hidden: int, dtype: str, device: torch.device, copy: float) -> Rates:
    """Measure the product at the size of all frames at once: W_m (D, C) with M (C, B T P)."""
    clips, frames, channels, height, width = shape
    by_name = measure.gemm_rates(clips * frames * height * width, channels, hidden, DTYPES[dtype], device)
    by = max(by_name, key=by_name.__getitem__)
    return Rates(by_name[by], by, copy)
