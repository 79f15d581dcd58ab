"""`strip_pool`: the mean over time and width, summed in fp32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(s: Tensor) -> Tensor:
    """Average s (B, T, C, H, W) over time and width: (B, C, H), eq. 9."""
    return s.mean((1, 4), dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


def backward(d_strips: Tensor, frames: int, width: int) -> Tensor:
    """Return the gradient of s, (B, T, C, H, W), contiguous, from that of the strips, (B, C, H)."""
    scaled = d_strips / (frames * width)
    return scaled[:, None, :, :, None].expand(-1, frames, -1, -1, width).contiguous()
