"""No speed-up is reported for a wrong answer: what is about to be timed is first held to the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXACT = 1e-9  # relative, in float64
Compared = dict[str, tuple[float, float]]
"""By the name of a tensor, its error and what that may be."""


SETTLED = 4  # epsilons of a dtype; what is summed in it seldom moves as far
DRAWS = 20  # of maps and weights at most, until one is settled
SEEDS = range(DRAWS)


class _Kinks(TorchFunctionMode):
    """Inside, how near to zero anything comes of what a ReLU is given, but zero itself: x - x is that in any dtype."""

    nearest = float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.relu:
            off = args[0].detach().abs()
            self.nearest = min(self.nearest, float(torch.where(off > 0, off, torch.inf).min()))
        return func(*args, **(kwargs or {}))


def settled(oracle: Callable[[], object], dtype: torch.dtype) -> bool:
    """Whether rounding to a dtype leaves every ReLU of a plain PyTorch run in float64 on its side of zero.

    A gradient jumps where one changes sides: by a thousandth of its size for one of the paper's two and a half million.
    In float32 every third draw of that size is settled. In 16 bits thousands change sides in whatever
    runs: any draw will do.
    """
    if dtype.itemsize == 2:
        return True
    with _Kinks() as kinks:
        oracle()
    return bool(kinks.nearest > SETTLED * torch.finfo(dtype).eps)


def error(got: Tensor, wanted: Tensor) -> float:
    """Distance relative to the size of what is wanted; inf where got is not a number."""
    difference = (got.detach().double() - wanted.detach().double()).norm()
    size = wanted.detach().double().norm()
    relative = float(difference / size) if size > 0 else float(difference)
    return relative if relative == relative else float("inf")


def demand(name: str, got: Mapping[str, Tensor], eager: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> float:
    """`judge` a single draw."""
    return judge(name, [compare(got, eager, oracle)])


def compare(got: Mapping[str, Tensor], eager: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> Compared:
    """Errors of `got`, which may be twice eager's in the same dtype plus one rounding.

    In float64, where eager is the oracle itself, it may be EXACT.
    """

    def allowed(key: str) -> float:
        dtype = got[key].dtype
        return EXACT if dtype == torch.float64 else 2 * error(eager[key], oracle[key]) + torch.finfo(dtype).eps

    return {key: (error(got[key], wanted), allowed(key)) for key, wanted in oracle.items()}


def judge(name: str, draws: Sequence[Compared]) -> float:
    """Print and return the worst error, of the medians over draws.

    More than one draw where tensors are small: of a handful of roundings, luck alone decides which side they fall.

    Raises:
        SystemExit: one is more than it may be; names the tensor, so that nothing is measured.
    """
    worst = 0.0
    for key in draws[0]:
        off, allowed = (median(draw[key][i] for draw in draws) for i in (0, 1))
        if off > allowed:
            raise SystemExit(f"parity: {name} is off by {off:.1e} in {key}, allowed {allowed:.1e}; it is not measured")
        worst = max(worst, off)
    print(f"parity: {name} is within {worst:.1e} of the float64 oracle")
    return worst


def gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of all leaves by name, as `demand` compares them."""
    found = torch.autograd.grad(list(outputs), list(leaves.values()), list(upstream))
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return {**results, **{f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}}
