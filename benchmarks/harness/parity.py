"""Parity before speed: no figure is reported for an implementation that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rru_fast.testing import Error, median_errors

SEEDS = range(20)
"""Seeds of maps and weights, tried until none of the oracle's ReLUs is near zero."""


def report_parity(name: str, draws: Sequence[Mapping[str, Error]]) -> float:
    """Print and return the worst relative error over tensors, of the medians over draws.

    Args:
        name: of the implementation, as printed.
        draws: results of `rru_fast.testing.compare`, by tensor name. Several for small tensors, where chance decides
            the rounding of a single draw.

    Raises:
        SystemExit: an error exceeds its bound; names the tensor, so that nothing is measured.
    """
    worst = 0.0
    for key, error in median_errors(draws).items():
        if error.got > error.allowed:
            off, allowed = f"{error.got:.1e}", f"{error.allowed:.1e}"
            raise SystemExit(f"parity: {name} is off by {off} in {key}, allowed {allowed}; it is not measured")
        worst = max(worst, error.got)
    print(f"parity: {name} is within {worst:.1e} of the float64 oracle")
    return worst


def format_error(error: Exception) -> str:
    """Return the type and the first line of an error, for a row or a line of output."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
