"""The forward kernels of `refine`: `transition` makes U, eq. 1, and its batch statistics; `gate` the rest, eq. 2-5, 9.

Maps are (B, F, C, P) behind a pointer and strides, P = H W; F frames of them lie in one launch. SUM is the type of
arithmetic, float64 for float64 and float32 otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import last_to_arrive, narrowed, normalise, product


@triton.jit(do_not_specialize=["first"])
def transition_kernel(
    u,  # (F, B, D, P)
    x,  # (B, F, C, P)
    x_clip,
    x_frame,
    x_channel,
    x_position,
    y,  # like x, subtracted from it; or None
    y_clip,
    y_frame,
    y_channel,
    y_position,
    w,  # (D, C)
    w_gate,
    partial,  # (tiles, SPLIT, BLOCK_D, BLOCK_P), where SPLIT > 1
    arrivals,  # (tiles + groups * d tiles,), zeros
    tile_mean,  # (B * p tiles, D)
    tile_square,  # (B * p tiles, D), sums of squared differences from the tile's own mean
    mean,  # (groups, D), or None: no statistics
    var,
    lengths,  # (B,), or None
    first,  # the first of the F frames is the video's frame `first`
    clips,
    channels,
    clips_per_group,
    D: tl.constexpr,
    P: tl.constexpr,
    ADD: tl.constexpr,  # whether u already holds a part of the sum
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """U = W V, V = X - Y formed in full precision on load; U is split over C, the last program of a tile adds up."""
    SUM: tl.constexpr = u.dtype.element_ty
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    P_TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile = tl.program_id(0)
    part = tl.program_id(1)
    d_tile = tile % D_TILES
    columns = tile // D_TILES
    frame_clip = columns // P_TILES
    clip = (frame_clip % clips).to(tl.int64)
    frame = (frame_clip // clips).to(tl.int64)
    d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    p = columns % P_TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    alive = p < P
    if lengths is not None:
        alive = alive & (first + frame < tl.load(lengths + clip))

    x += clip * x_clip + frame * x_frame
    if y is not None:
        y += clip * y_clip + frame * y_frame
    acc = tl.zeros([BLOCK_D, BLOCK_P], SUM)
    share = tl.cdiv(tl.cdiv(channels, BLOCK_K), SPLIT) * BLOCK_K
    for c0 in range(part * share, tl.minimum((part + 1) * share, channels), BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        weights = tl.load(w + d[:, None] * w_gate + c[None, :], (d < D)[:, None] & (c < channels)[None, :], 0.0)
        inside = (c < channels)[:, None] & alive[None, :]
        if WIDE:
            c = c.to(tl.int64)
        v = tl.load(x + c[:, None] * x_channel + p[None, :] * x_position, inside, 0.0).to(SUM)
        if y is not None:
            v -= tl.load(y + c[:, None] * y_channel + p[None, :] * y_position, inside, 0.0).to(SUM)
        acc = product(weights, narrowed(v, weights.dtype), acc, PRECISION)

    if SPLIT == 1:
        _finish(u, acc, frame_clip, d, p, tile_mean, tile_square, mean, var, arrivals, tile, clips_per_group, D, P, ADD)
    else:
        i = tl.arange(0, BLOCK_D)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        partial += tile.to(tl.int64) * (SPLIT * BLOCK_D * BLOCK_P) + i
        tl.store(partial + part * (BLOCK_D * BLOCK_P), acc)
        if last_to_arrive(arrivals + tile, SPLIT):
            acc = tl.load(partial, cache_modifier=".cg")
            for other in range(1, SPLIT):
                acc += tl.load(partial + other * (BLOCK_D * BLOCK_P), cache_modifier=".cg")
            _finish(
                u, acc, frame_clip, d, p, tile_mean, tile_square, mean, var, arrivals, tile, clips_per_group, D, P, ADD
            )


@triton.jit
def _finish(
    u,
    acc,
    frame_clip,
    d,
    p,
    tile_mean,
    tile_square,
    mean,
    var,
    arrivals,
    tile,
    clips_per_group,
    D: tl.constexpr,
    P: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store a tile of U; the last tile of a group merges the statistics of all."""
    BLOCK_D: tl.constexpr = acc.shape[0]
    BLOCK_P: tl.constexpr = acc.shape[1]
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    P_TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    inside = (d < D)[:, None] & (p < P)[None, :]
    u += frame_clip.to(tl.int64) * (D * P) + d[:, None] * P + p[None, :]
    if ADD:
        acc += tl.load(u, inside, 0.0)
    tl.store(u, acc, inside)
    if mean is not None:
        d_tile = tile % D_TILES
        columns = tile // D_TILES
        count = tl.minimum(P - columns % P_TILES * BLOCK_P, BLOCK_P)
        own_mean = tl.sum(tl.where(inside, acc, 0.0), 1) / count
        difference = tl.where(inside, acc - own_mean[:, None], 0.0)
        tl.store(tile_mean + columns * D + d, own_mean, d < D)
        tl.store(tile_square + columns * D + d, tl.sum(difference * difference, 1), d < D)
        group = frame_clip // clips_per_group
        tiles = clips_per_group * P_TILES
        arrivals += tl.num_programs(0) + group * D_TILES + d_tile
        if last_to_arrive(arrivals, tiles):
            _merge(tile_mean, tile_square, mean + group * D, var + group * D, group * tiles, tiles, d, D, P, BLOCK_P)


@triton.jit
def _merge(tile_mean, tile_square, mean, var, begin, tiles, d, D: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The mean and the biased variance of a group from its tiles', in the tiles' order."""
    SUM: tl.constexpr = tile_mean.dtype.element_ty
    BLOCK: tl.constexpr = 16
    P_TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    elements = (tiles // P_TILES * P).to(SUM)
    total = tl.zeros_like(d).to(SUM)
    for i0 in range(0, tiles, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        count = tl.minimum(P - i % P_TILES * BLOCK_P, BLOCK_P).to(SUM)
        own = tl.load(
            tile_mean + (begin + i)[:, None] * D + d[None, :], (i < tiles)[:, None] & (d < D)[None, :], 0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        total += tl.sum(own * count[:, None], 0)
    centre = total / elements
    square = tl.zeros_like(d).to(SUM)
    for i0 in range(0, tiles, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inside = (i < tiles)[:, None] & (d < D)[None, :]
        at = (begin + i)[:, None] * D + d[None, :]
        count = tl.minimum(P - i % P_TILES * BLOCK_P, BLOCK_P).to(SUM)
        away = tl.load(tile_mean + at, inside, 0.0, cache_modifier=".cg") - centre[None, :]
        own = tl.load(tile_square + at, inside, 0.0, cache_modifier=".cg") + away * away * count[:, None]
        square += tl.sum(tl.where(inside, own, 0.0), 0)
    tl.store(mean + d, centre, d < D)
    tl.store(var + d, square / elements, d < D)


@triton.jit(do_not_specialize=["t"])
def gate_kernel(
    out,  # S_t (B, C, P), P contiguous
    out_clip,
    state,  # S_t in float32 beside a 16-bit `out`, read and written (B, C, P); or None
    strips,  # (B, C, H), sums of S over time and columns
    x,  # X_t (B, C, P)
    x_clip,
    x_channel,
    x_position,
    s,  # S_{t-1} (B, C, P); None at a first frame, where S = X
    s_clip,
    s_channel,
    s_position,
    u,  # U_t (B, D, P)
    gamma,  # (D,)
    beta,  # (D,)
    mean,  # (groups, D)
    var,
    w_s1,  # (A, P), or None
    w_s2,  # (P, A), or None
    w_c,  # (C, D), or None
    h,  # (B, A), out; or None
    z_s,  # (B, P), out; or None
    z_c,  # (B, C), out; or None where the variant has none
    lengths,  # (B,), or None
    t,
    channels,
    clips_per_group,
    D: tl.constexpr,
    A: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    EPS: tl.constexpr,
    FIRST: tl.constexpr,  # whether this frame is the first of the strips
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A clip and CHUNK channels a program: attention from the clip's U, then S_t = S_{t-1} + Z (X_t - S_{t-1})."""
    SUM: tl.constexpr = strips.dtype.element_ty
    P: tl.constexpr = H * W
    Q: tl.constexpr = BLOCK_H * BLOCK_W  # positions, a row at a time rounded up to a power of 2
    clip = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    q = tl.arange(0, Q)
    row = q // BLOCK_W
    column = q % BLOCK_W
    p = row * W + column
    live = (row < H) & (column < W)

    SPATIAL: tl.constexpr = w_s1 is not None
    CHANNEL: tl.constexpr = w_c is not None
    v_s = tl.zeros([Q], SUM)
    if s is not None:
        u += clip * (D * P)
        mean += clip // clips_per_group * D
        var += clip // clips_per_group * D
        pooled = tl.zeros([Q], SUM)
        c_all = begin + tl.arange(0, CHUNK)
        v_c = tl.zeros([CHUNK], SUM)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = (d < D)[:, None] & live[None, :]
            _, y, _ = normalise(u, mean, var, gamma, beta, d, p, inside, D, P, EPS)  # [BLOCK_D, Q]
            pooled += tl.sum(y, 0)
            if CHANNEL:
                weights = tl.load(
                    w_c + c_all.to(tl.int64)[:, None] * D + d[None, :],
                    (c_all < channels)[:, None] & (d < D)[None, :],
                    0.0,
                )  # [CHUNK, BLOCK_D]
                v_c += tl.sum(weights.to(SUM) * (tl.sum(y, 1) / P)[None, :], 1)
        if SPATIAL:
            pooled = pooled / D
            for a0 in range(0, A, BLOCK_A):
                a = a0 + tl.arange(0, BLOCK_A)
                weights = tl.load(w_s1 + a[:, None] * P + p[None, :], (a < A)[:, None] & live[None, :], 0.0)
                v_h = tl.sum(weights.to(SUM) * pooled[None, :], 1)
                v_h = tl.where(v_h <= 0, 0.0, v_h)  # a NaN stays one
                if h is not None and begin == 0:
                    tl.store(h + clip * A + a, v_h, a < A)
                weights = tl.load(w_s2 + p[:, None] * A + a[None, :], live[:, None] & (a < A)[None, :], 0.0)
                v_s += tl.sum(weights.to(SUM) * v_h[None, :], 1)
            if z_s is not None and begin == 0:
                tl.store(z_s + clip * P + p, v_s, live)
        if CHANNEL:
            z_c += clip * channels
            tl.store(z_c + c_all, v_c, c_all < channels)
            tl.debug_barrier()  # read back below, by other threads

    x += clip * x_clip
    out += clip * out_clip
    if state is not None:
        state += clip * channels * P
    if s is not None:
        s += clip * s_clip
    for c0 in range(begin, tl.minimum(begin + CHUNK, channels), BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & live[None, :]
        rows = strips + (clip * channels + c)[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
        if WIDE:
            c = c.to(tl.int64)
        there = inside
        if lengths is not None:
            there = inside & (t < tl.load(lengths + clip))
        new = tl.load(x + c[:, None] * x_channel + p[None, :] * x_position, there, 0.0).to(SUM)
        if s is not None:
            old = tl.load(s + c[:, None] * s_channel + p[None, :] * s_position, inside, 0.0).to(SUM)
            if not CHANNEL:
                logits = tl.broadcast_to(v_s[None, :], BLOCK_C, Q)
            elif not SPATIAL:
                logits = tl.broadcast_to(tl.load(z_c + c, c < channels, 0.0)[:, None], BLOCK_C, Q)
            else:
                logits = tl.load(z_c + c, c < channels, 0.0)[:, None] * v_s[None, :]
            new = old + tl.sigmoid(logits) * (new - old)  # eq. 4, 5
        at = c[:, None] * P + p[None, :]
        if state is not None:
            # S_{t-1} was read from there: where a block has fewer elements than threads, several read the same one.
            tl.debug_barrier()
            tl.store(state + at, new, inside)
        new = tl.where(there, new, 0.0)
        tl.store(out + at, narrowed(new, out.dtype.element_ty), inside)
        summed = tl.sum(tl.reshape(new, (BLOCK_C, BLOCK_H, BLOCK_W)), 2)  # [BLOCK_C, BLOCK_H]
        here = (c < channels)[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :]
        if not FIRST:
            summed += tl.load(rows, here, 0.0)
        tl.store(rows, summed, here)
