"""`strip_pool`: the mean over time and width, in one pass over S, and one over its gradient."""

from __future__ import annotations

from torch import Tensor

from rru_fast.triton import _launch
from rru_fast.triton import strip_pool_kernels as kernels
from rru_fast.triton._device import on_device
from rru_fast.triton._launch import cdiv, next_power_of_2
from rru_fast.triton._precision import TL_DTYPES, acc_dtype
from rru_fast.triton._strided import StridedMaps, as_strided_maps, needs_int64


def forward(s: Tensor) -> Tensor:
    """Average s (B, T, C, H, W) over time and width: (B, C, H), eq. 9."""
    clips, frames, channels, height, width = s.shape
    strips = s.new_empty(clips, channels, height)
    if strips.numel() == 0:
        return strips
    block_w = min(64, next_power_of_2(width))
    block_h = min(64 // block_w, next_power_of_2(height))
    strided = as_strided_maps(s)
    with on_device(s):
        _launch.launch(
            kernels.strip_pool_fwd_kernel,
            (clips, cdiv(channels, 32), cdiv(height, block_h)),
            strips=strips,
            s=strided,
            frames=frames,
            channels=channels,
            H=height,
            W=width,
            ACC=TL_DTYPES[acc_dtype(s.dtype)],
            INT64_OFFSETS=needs_int64(strided),
            BLOCK_C=32,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            num_warps=4,
        )
    return strips


def backward(d_strips: Tensor, frames: int, width: int) -> Tensor:
    """Return the gradient of s, (B, T, C, H, W), contiguous, from that of the strips, (B, C, H)."""
    clips, channels, height = d_strips.shape
    d_s = d_strips.new_empty(clips, frames, channels, height, width)
    if d_s.numel() == 0:
        return d_s
    clip, channel, row = d_strips.stride()
    block_p = min(64, next_power_of_2(height * width))
    with on_device(d_strips):
        _launch.launch(
            kernels.strip_pool_bwd_kernel,
            (clips * frames, cdiv(channels, 32), cdiv(height * width, block_p)),
            d_s=d_s,
            d_strips=StridedMaps(d_strips, clip, 0, channel, row),
            frames=frames,
            channels=channels,
            P=height * width,
            W=width,
            ACC=TL_DTYPES[acc_dtype(d_strips.dtype)],
            BLOCK_C=32,
            BLOCK_P=block_p,
            num_warps=4,
        )
    return d_s
