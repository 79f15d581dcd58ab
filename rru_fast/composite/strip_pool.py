"""`strip_pool`: the mean over time and width, summed in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(s: Tensor) -> Tensor:
    """(B, T, C, H, W) to (B, C, H), eq. 9."""
    return s.mean((1, 4), dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


def backward(d_strips: Tensor, frames: int, width: int) -> Tensor:
    """(B, C, H) to (B, T, C, H, W), contiguous."""
    share = d_strips / (frames * width)
    return share[:, None, :, :, None].expand(-1, frames, -1, -1, width).contiguous()
