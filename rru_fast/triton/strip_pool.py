"""`strip_pool`: the mean over time and width, one pass over S and one over its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton._device import narrowed
from rru_fast.triton._host import power_of_2


@triton.jit
def strip_pool_kernel(
    strips,  # (B, C, H), out
    s,  # (B, T, C, P)
    s_clip,
    s_frame,
    s_channel,
    s_position,
    frames,
    channels,
    H: tl.constexpr,
    W: tl.constexpr,
    SUM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A clip, BLOCK_C channels and BLOCK_H rows a program."""
    clip = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    row = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    here = (c < channels)[:, None] & (row < H)[None, :]
    q = tl.arange(0, BLOCK_H * BLOCK_W)
    s += clip * s_clip
    total = tl.zeros([BLOCK_C, BLOCK_H], SUM)
    for t in range(frames):
        for w0 in range(0, W, BLOCK_W):
            i = tl.program_id(2) * BLOCK_H + q // BLOCK_W
            j = w0 + q % BLOCK_W
            inside = (c < channels)[:, None] & ((i < H) & (j < W))[None, :]
            v = tl.load(s + c[:, None] * s_channel + (i * W + j)[None, :] * s_position, inside, 0.0).to(SUM)
            total += tl.sum(tl.reshape(v, (BLOCK_C, BLOCK_H, BLOCK_W)), 2)
        s += s_frame
    at = (clip * channels + c)[:, None] * H + row[None, :]
    tl.store(strips + at, narrowed(total / (frames * W), strips.dtype.element_ty), here)


@triton.jit
def strip_pool_backward_kernel(
    d_s,  # (B, T, C, H, W), out
    d_strips,  # (B, C, H)
    clip_stride,
    channel_stride,
    row_stride,
    frames,
    channels,
    P: tl.constexpr,
    W: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A frame of a clip, BLOCK_C channels and BLOCK_P positions a program."""
    frame = tl.program_id(1).to(tl.int64)  # of all clips' frames
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < P)[None, :]
    d_strips += frame // frames * clip_stride
    share = tl.load(d_strips + c[:, None] * channel_stride + (p // W)[None, :] * row_stride, inside, 0.0).to(SUM)
    at = (frame * channels + c)[:, None] * P + p[None, :]
    tl.store(d_s + at, narrowed(share / (frames * W), d_s.dtype.element_ty), inside)


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
        host.launch(
            strip_pool_kernel,
            (-(-channels // 32), clips, -(-height // block_h)),
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
        host.launch(
            strip_pool_backward_kernel,
            (-(-channels // 32), clips * frames, -(-height * width // block_p)),
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
