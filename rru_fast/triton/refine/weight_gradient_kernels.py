"""Kernels of the weights' gradients of `refine`, sums over frames and clips."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import cast_rn, dot, sum_split


@triton.jit(do_not_specialize=["t_first"])
def refine_bwd_dw_kernel(
    d_w,  # StridedMatrix (D, C) or (D, 2 C), out
    recurrent_column,  # first column of w_recurrent in d_w
    input_column,  # first column of w_input in d_w
    partials,  # (tiles, SPLIT, BLOCK_D, BLOCK_C), if SPLIT > 1
    arrivals,  # (tiles,), zeros
    du,  # (F, B, D, P)
    recurrent_operand,  # Operand of w_recurrent
    input_operand,  # Operand of w_input, if HALVES = 2; both operands have a subtrahend or neither has
    lengths,  # (B,), or None
    t_first,  # index in the video of the first of the F frames
    frames,
    clips,
    channels,
    D: tl.constexpr,
    P: tl.constexpr,
    HALVES: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # d_w holds a part of the sum already
    OPERAND_DTYPE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute dW = sum over frames and clips of dU V^T, V a difference formed unrounded on load.

    Both halves of dW in one launch; each tile is split over frames and clips, and its last program adds the parts.
    """
    ACC: tl.constexpr = du.dtype.element_ty
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    P_TILES: tl.constexpr = (P + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    part = tl.program_id(1)
    c_tile = tile // D_TILES
    column = recurrent_column
    x = recurrent_operand.x.ptr
    x_clip = recurrent_operand.x.clip
    x_frame = recurrent_operand.x.frame
    x_channel = recurrent_operand.x.channel
    x_position = recurrent_operand.x.position
    if recurrent_operand.subtracted is not None:
        y = recurrent_operand.subtracted.ptr
        y_clip = recurrent_operand.subtracted.clip
        y_frame = recurrent_operand.subtracted.frame
        y_channel = recurrent_operand.subtracted.channel
        y_position = recurrent_operand.subtracted.position
    if HALVES == 2:
        second = c_tile % 2 == 1
        column = tl.where(second, input_column, recurrent_column)
        x = tl.where(second, input_operand.x.ptr, x)
        x_clip = tl.where(second, input_operand.x.clip, x_clip)
        x_frame = tl.where(second, input_operand.x.frame, x_frame)
        x_channel = tl.where(second, input_operand.x.channel, x_channel)
        x_position = tl.where(second, input_operand.x.position, x_position)
        if recurrent_operand.subtracted is not None:
            y = tl.where(second, input_operand.subtracted.ptr, y)
            y_clip = tl.where(second, input_operand.subtracted.clip, y_clip)
            y_frame = tl.where(second, input_operand.subtracted.frame, y_frame)
            y_channel = tl.where(second, input_operand.subtracted.channel, y_channel)
            y_position = tl.where(second, input_operand.subtracted.position, y_position)
    d = tile % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    c = c_tile // HALVES * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = c < channels
    m_dc = (d < D)[:, None] & m_c[None, :]
    if INT64_OFFSETS:
        c = c.to(tl.int64)
    acc = tl.zeros([BLOCK_D, BLOCK_C], ACC)
    pieces = frames * clips * P_TILES
    pieces_per_part = tl.cdiv(pieces, SPLIT)
    for i in range(part * pieces_per_part, tl.minimum((part + 1) * pieces_per_part, pieces)):
        frame_clip = i // P_TILES
        p = i % P_TILES * BLOCK_K + tl.arange(0, BLOCK_K)
        clip = (frame_clip % clips).to(tl.int64)
        frame = (frame_clip // clips).to(tl.int64)
        m_p = p < P
        p_du = du + frame_clip.to(tl.int64) * (D * P)
        b_du = tl.load(p_du + d[:, None] * P + p[None, :], (d < D)[:, None] & m_p[None, :], 0.0)
        if lengths is not None:
            m_p = m_p & (t_first + frame < tl.load(lengths + clip))
        m_cp = m_c[:, None] & m_p[None, :]
        p_x = x + clip * x_clip + frame * x_frame
        b_v = tl.load(p_x + c[:, None] * x_channel + p[None, :] * x_position, m_cp, 0.0).to(ACC)
        if recurrent_operand.subtracted is not None:
            p_y = y + clip * y_clip + frame * y_frame
            b_v -= tl.load(p_y + c[:, None] * y_channel + p[None, :] * y_position, m_cp, 0.0).to(ACC)
        acc = dot(cast_rn(b_du, OPERAND_DTYPE), tl.trans(cast_rn(b_v, OPERAND_DTYPE)), acc, PRECISION)

    acc, last = sum_split(acc, partials, arrivals, tile, part, SPLIT)
    if last:
        # After the loop, which would spill if these addresses took registers.
        p_d_w = d_w.ptr + column + d[:, None] * d_w.row + c[None, :]
        if ACCUMULATE:
            acc += tl.load(p_d_w, m_dc, 0.0)
        tl.store(p_d_w, acc, m_dc)


@triton.jit
def atb_kernel(
    out,  # (M, N), out
    a,  # (K, M)
    b,  # (K, N)
    k_total,
    m_total,
    n_total,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute A^T B: the small weights' gradients, K clips and frames in a row."""
    ACC: tl.constexpr = a.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for k0 in range(0, k_total, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_a = (m < m_total)[:, None] & (k < k_total)[None, :]
        m_b = (k < k_total)[:, None] & (n < n_total)[None, :]
        b_a = tl.load(a + k[None, :] * m_total + m[:, None], m_a, 0.0)
        b_b = tl.load(b + k[:, None] * n_total + n[None, :], m_b, 0.0)
        acc = dot(b_a, b_b, acc, "ieee")
    o = m.to(tl.int64)[:, None] * n_total + n[None, :]
    tl.store(out + o, acc.to(out.dtype.element_ty), (m < m_total)[:, None] & (n < n_total)[None, :])
