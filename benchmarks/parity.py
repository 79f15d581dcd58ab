"""No speed-up is reported for a wrong answer: what is about to be timed is first held to the float64 oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def error(got: Tensor, wanted: Tensor) -> float:
    """Distance relative to the size of what is wanted; inf where got is not a number."""
    difference = (got.detach().double() - wanted.detach().double()).norm()
    size = wanted.detach().double().norm()
    relative = float(difference / size) if size > 0 else float(difference)
    return relative if relative == relative else float("inf")


def demand(
    name: str,
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
) -> float:
    """Print and return the worst error of `got`, which may be twice eager's in the same dtype plus one rounding.

    Raises:
        SystemExit: it is more; names the tensor, so that nothing is measured.
    """
    worst = 0.0
    for key, wanted in oracle.items():
        rounding = torch.finfo(got[key].dtype).eps
        allowed = 2 * error(eager[key], wanted) + rounding
        off = error(got[key], wanted)
        if off > allowed:
            raise SystemExit(
                f"parity: {name} is off by {off:.1e} in {key}, allowed {allowed:.1e}; nothing was measured"
            )
        worst = max(worst, off)
    print(f"parity: {name} is within {worst:.1e} of the float64 oracle")
    return worst


def gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of all leaves by name, as `demand` compares them."""
    found = torch.autograd.grad(list(outputs), list(leaves.values()), list(upstream))
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return {**results, **{f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}}
