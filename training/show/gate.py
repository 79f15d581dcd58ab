"""Gate Z_t of an RRU, which its operators do not return."""

from __future__ import annotations

from torch import Tensor

from rru_fast.reference import RRU, equations
from rru_fast.reference.modules import gate_arguments


def gate(rru: RRU, x: Tensor, s_before: Tensor, x_before: Tensor) -> Tensor:
    """Compute the gate Z_t, eq. 1-4, with the RRU's weights and in the mode of its batch norm.

    Args:
        rru: the module.
        x, s_before, x_before: X_t, S_{t-1} and X_{t-1}, (N, C, H, W).

    Returns:
        Z_t, (N, C, H, W), from 0, which selects the past, to 1, which selects the frame.
    """
    return equations.gate(x, s_before, x_before, rru.transition_norm, **gate_arguments(rru)).expand_as(x)
