"""Valid arguments of a small `refine` call, for tests to change one at a time."""

from __future__ import annotations

from typing import Any

import torch

B, T, C, H, W, D, A = 2, 3, 4, 3, 2, 5, 3


def arguments(**changes: Any) -> dict[str, Any]:
    """Tensors by name, with some of them changed or added."""
    valid = {
        "x": torch.randn(B, T, C, H, W),
        "w": torch.randn(D, 2 * C),
        "gamma": torch.ones(D),
        "beta": torch.zeros(D),
        "w_s1": torch.randn(A, H * W),
        "w_s2": torch.randn(H * W, A),
        "w_c": torch.randn(C, D),
        "running_mean": torch.zeros(D),
        "running_var": torch.ones(D),
    }
    return {**valid, **changes}
