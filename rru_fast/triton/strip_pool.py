"""`strip_pool`: the mean over time and width, one pass over S and one over its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton import _launch
from rru_fast.triton import strip_pool_kernels as kernels
from rru_fast.triton._host import power_of_2


def forward(s: Tensor) -> Tensor:
    """(B, T, C, H, W) to (B, C, H), eq. 9."""
    clips, frames, channels, height, width = s.shape
    strips = s.new_empty(clips, channels, height)
    if strips.numel() == 0:
        return strips
    block_w = min(64, power_of_2(width))
    block_h = min(64 // block_w, power_of_2(height))
    maps = host.maps(s)
    with host.on_device(s):
        _launch.launch(
            kernels.strip_pool_kernel,
            (clips, -(-channels // 32), -(-height // block_h)),
            strips,
            *maps,
            frames,
            channels,
            H=height,
            W=width,
            SUM=host.TYPES[torch.promote_types(s.dtype, torch.float32)],
            WIDE=maps.wide,
            BLOCK_C=32,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            num_warps=4,
        )
    return strips


def backward(d_strips: Tensor, frames: int, width: int) -> Tensor:
    """(B, C, H) to (B, T, C, H, W), contiguous."""
    clips, channels, height = d_strips.shape
    d_s = d_strips.new_empty(clips, frames, channels, height, width)
    if d_s.numel() == 0:
        return d_s
    block_p = min(64, power_of_2(height * width))
    with host.on_device(d_strips):
        _launch.launch(
            kernels.strip_pool_backward_kernel,
            (clips * frames, -(-channels // 32), -(-height * width // block_p)),
            d_s,
            d_strips,
            *d_strips.stride(),
            frames,
            channels,
            P=height * width,
            W=width,
            SUM=host.TYPES[torch.promote_types(d_strips.dtype, torch.float32)],
            BLOCK_C=32,
            BLOCK_P=block_p,
            num_warps=4,
        )
    return d_s
