"""`strip_pool` in C++: csrc/cpu/strip_pool.cpp."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def forward(s: Tensor) -> Tensor:
    """Average s (B, T, C, H, W) over time and width: (B, C, H), eq. 9."""
    return cast(Tensor, torch.ops.rru_fast.strip_pool_cpu.default(s))


def backward(d_strips: Tensor, frames: int, width: int) -> Tensor:
    """Return the gradient of s, (B, T, C, H, W), from that of the strips, (B, C, H)."""
    return cast(Tensor, torch.ops.rru_fast.strip_pool_backward_cpu.default(d_strips, frames, width))
