"""Kernels of `strip_pool`."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import cast_rn


@triton.jit
def strip_pool_fwd_kernel(
    strips,  # (B, C, H), out
    s,  # StridedMaps (B, T, C, P)
    frames,
    channels,
    H: tl.constexpr,
    W: tl.constexpr,
    ACC: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Average over time and width; a program has one clip, BLOCK_C channels and BLOCK_H rows."""
    clip = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64_OFFSETS:
        c = c.to(tl.int64)
    row = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_out = (c < channels)[:, None] & (row < H)[None, :]
    q = tl.arange(0, BLOCK_H * BLOCK_W)
    p_s = s.ptr + clip * s.clip
    acc = tl.zeros([BLOCK_C, BLOCK_H], ACC)
    for _ in range(frames):
        for w0 in range(0, W, BLOCK_W):
            i = tl.program_id(2) * BLOCK_H + q // BLOCK_W
            j = w0 + q % BLOCK_W
            m = (c < channels)[:, None] & ((i < H) & (j < W))[None, :]
            b_s = tl.load(p_s + c[:, None] * s.channel + (i * W + j)[None, :] * s.position, m, 0.0).to(ACC)
            acc += tl.sum(tl.reshape(b_s, (BLOCK_C, BLOCK_H, BLOCK_W)), 2)
        p_s += s.frame
    o = (clip * channels + c)[:, None] * H + row[None, :]
    tl.store(strips + o, cast_rn(acc / (frames * W), strips.dtype.element_ty), m_out)


@triton.jit
def strip_pool_bwd_kernel(
    d_s,  # (B, T, C, H, W), out
    d_strips,  # StridedMaps (B, 1, C, H): of each clip, its rows as positions
    frames,
    channels,
    P: tl.constexpr,
    W: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Spread the gradient over time and width; a program has one frame, BLOCK_C channels and BLOCK_P positions."""
    frame = tl.program_id(0).to(tl.int64)  # of all clips
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = (c < channels)[:, None] & (p < P)[None, :]
    p_d = d_strips.ptr + frame // frames * d_strips.clip
    b_d = tl.load(p_d + c[:, None] * d_strips.channel + (p // W)[None, :] * d_strips.position, m, 0.0).to(ACC)
    o = (frame * channels + c)[:, None] * P + p[None, :]
    tl.store(d_s + o, cast_rn(b_d / (frames * W), d_s.dtype.element_ty), m)
