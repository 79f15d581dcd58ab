"""The kernels of the weights' gradients of `refine`, sums over frames and clips."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import last_to_arrive, narrowed, product


@triton.jit(do_not_specialize=["first"])
def weight_gradient_kernel(
    d_w,  # (D, C) or (D, 2 C), out
    d_w_row,
    s_column,  # first of the columns of W_a or W_p
    x_column,  # first of the columns of W_m or W_x
    partial,  # (tiles, SPLIT, BLOCK_D, BLOCK_C), where SPLIT > 1
    arrivals,  # (tiles,), zeros
    du,  # (F, B, D, P)
    s,  # the operand of W_a or W_p (B, F, C, P)
    s_clip,
    s_frame,
    s_channel,
    s_position,
    s_less,  # like s, subtracted from it; or None
    s_less_clip,
    s_less_frame,
    s_less_channel,
    s_less_position,
    x,  # the operand of W_m or W_x, where HALVES = 2
    x_clip,
    x_frame,
    x_channel,
    x_position,
    x_less,  # like x, subtracted from it; None where s_less is
    x_less_clip,
    x_less_frame,
    x_less_channel,
    x_less_position,
    lengths,  # (B,), or None
    first,  # the first of the F frames is the video's frame `first`
    frames,
    clips,
    channels,
    D: tl.constexpr,
    P: tl.constexpr,
    HALVES: tl.constexpr,
    ADD: tl.constexpr,  # d_w already holds a part of the sum
    DOT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW = sum over frames and clips of dU V^T, V a difference formed in full precision on load.

    Both halves of dW in one launch; each tile is split over frames and clips, and its last program adds the parts.
    """
    SUM: tl.constexpr = du.dtype.element_ty
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    P_TILES: tl.constexpr = (P + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    part = tl.program_id(1)
    columns = tile // D_TILES
    d_w += s_column
    if HALVES == 2:
        second = columns % 2 == 1
        d_w += tl.where(second, x_column - s_column, 0)
        s = tl.where(second, x, s)
        s_clip = tl.where(second, x_clip, s_clip)
        s_frame = tl.where(second, x_frame, s_frame)
        s_channel = tl.where(second, x_channel, s_channel)
        s_position = tl.where(second, x_position, s_position)
        if s_less is not None:
            s_less = tl.where(second, x_less, s_less)
            s_less_clip = tl.where(second, x_less_clip, s_less_clip)
            s_less_frame = tl.where(second, x_less_frame, s_less_frame)
            s_less_channel = tl.where(second, x_less_channel, s_less_channel)
            s_less_position = tl.where(second, x_less_position, s_less_position)
    d = tile % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    c = columns // HALVES * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    inside = (d < D)[:, None] & here[None, :]
    d_w += d[:, None] * d_w_row + c[None, :]
    if WIDE:
        c = c.to(tl.int64)
    acc = tl.zeros([BLOCK_D, BLOCK_C], SUM)
    pieces = frames * clips * P_TILES
    share = tl.cdiv(pieces, SPLIT)
    for i in range(part * share, tl.minimum((part + 1) * share, pieces)):
        frame_clip = i // P_TILES
        p = i % P_TILES * BLOCK_K + tl.arange(0, BLOCK_K)
        clip = (frame_clip % clips).to(tl.int64)
        frame = (frame_clip // clips).to(tl.int64)
        alive = p < P
        left = du + frame_clip.to(tl.int64) * (D * P)
        left = tl.load(left + d[:, None] * P + p[None, :], (d < D)[:, None] & alive[None, :], 0.0)
        if lengths is not None:
            alive = alive & (first + frame < tl.load(lengths + clip))
        at = s + clip * s_clip + frame * s_frame + c[:, None] * s_channel + p[None, :] * s_position
        v = tl.load(at, here[:, None] & alive[None, :], 0.0).to(SUM)
        if s_less is not None:
            at = s_less + clip * s_less_clip + frame * s_less_frame
            at += c[:, None] * s_less_channel + p[None, :] * s_less_position
            v -= tl.load(at, here[:, None] & alive[None, :], 0.0).to(SUM)
        acc = product(narrowed(left, DOT), tl.trans(narrowed(v, DOT)), acc, PRECISION)

    last = True
    if SPLIT > 1:
        i = tl.arange(0, BLOCK_D)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        partial += tile.to(tl.int64) * (SPLIT * BLOCK_D * BLOCK_C) + i
        tl.store(partial + part * (BLOCK_D * BLOCK_C), acc)
        last = last_to_arrive(arrivals + tile, SPLIT)
    if last:
        if SPLIT > 1:
            acc = tl.load(partial, cache_modifier=".cg")
            for other in range(1, SPLIT):
                acc += tl.load(partial + other * (BLOCK_D * BLOCK_C), cache_modifier=".cg")
        if ADD:
            acc += tl.load(d_w, inside, 0.0)
        tl.store(d_w, acc, inside)


@triton.jit
def outer_kernel(
    out,  # (M, N)
    left,  # (K, M)
    right,  # (K, N)
    k_total,
    m_total,
    n_total,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = left^T right: the small weights' gradients, K clips and steps in a row."""
    SUM: tl.constexpr = left.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for k0 in range(0, k_total, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        of_left = (m < m_total)[:, None] & (k < k_total)[None, :]
        of_right = (k < k_total)[:, None] & (n < n_total)[None, :]
        v = tl.load(left + k[None, :] * m_total + m[:, None], of_left, 0.0)
        w = tl.load(right + k[:, None] * n_total + n[None, :], of_right, 0.0)
        acc = product(v, w, acc, "ieee")
    at = m.to(tl.int64)[:, None] * n_total + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), (m < m_total)[:, None] & (n < n_total)[None, :])
