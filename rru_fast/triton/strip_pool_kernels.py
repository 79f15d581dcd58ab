"""The kernels of `strip_pool`."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import narrowed


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
    clip = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        c = c.to(tl.int64)
    row = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    here = (c < channels)[:, None] & (row < H)[None, :]
    q = tl.arange(0, BLOCK_H * BLOCK_W)
    s += clip * s_clip
    total = tl.zeros([BLOCK_C, BLOCK_H], SUM)
    for _ in range(frames):
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
    frame = tl.program_id(0).to(tl.int64)  # of all clips' frames
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < P)[None, :]
    d_strips += frame // frames * clip_stride
    share = tl.load(d_strips + c[:, None] * channel_stride + (p // W)[None, :] * row_stride, inside, 0.0).to(SUM)
    at = (frame * channels + c)[:, None] * P + p[None, :]
    tl.store(d_s + at, narrowed(share / (frames * W), d_s.dtype.element_ty), inside)
