"""Forward kernels of `refine`: the transition computes U, eq. 1, and its statistics; the gate the rest, eq. 2-5 and 9.

Feature maps are (B, F, C, P), P = H W; a launch has F frames of them. ACC is the accumulation dtype, float64 for
float64 and float32 otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import cast_rn, dot, grid_last_arrival, normalize, sum_split


@triton.jit(do_not_specialize=["t_first"])
def refine_fwd_transition_kernel(
    u,  # (F, B, D, P), out
    x,  # StridedMaps (B, F, C, P)
    subtracted,  # StridedMaps, subtracted from x; or None
    w,  # StridedMatrix (D, C)
    partials,  # (tiles, SPLIT, BLOCK_D, BLOCK_P), if SPLIT > 1
    arrivals,  # (tiles + groups * d tiles,), zeros
    tile_statistics,  # TileStatistics, each (B * p tiles, D)
    statistics,  # Statistics, each (groups, D), out; or None for both
    lengths,  # (B,), or None
    t_first,  # index in the video of the first of the F frames
    clips,
    channels,
    clips_per_group,
    D: tl.constexpr,
    P: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # u holds a part of the sum already
    INT64_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute U = W V, V = X - subtracted, formed unrounded on load.

    A program has a tile of U, split over C into SPLIT parts, which the tile's last program adds up.
    """
    ACC: tl.constexpr = u.dtype.element_ty
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    P_TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile = tl.program_id(0)
    part = tl.program_id(1)
    p_tile = tile // D_TILES  # of all frames and clips
    frame_clip = p_tile // P_TILES
    clip = (frame_clip % clips).to(tl.int64)
    frame = (frame_clip // clips).to(tl.int64)
    d = tile % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    p = p_tile % P_TILES * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = p < P
    if lengths is not None:
        m_p = m_p & (t_first + frame < tl.load(lengths + clip))

    p_x = x.ptr + clip * x.clip + frame * x.frame
    if subtracted is not None:
        p_subtracted = subtracted.ptr + clip * subtracted.clip + frame * subtracted.frame
    acc = tl.zeros([BLOCK_D, BLOCK_P], ACC)
    terms = tl.cdiv(tl.cdiv(channels, BLOCK_K), SPLIT) * BLOCK_K
    for c0 in range(part * terms, tl.minimum((part + 1) * terms, channels), BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        b_w = tl.load(w.ptr + d[:, None] * w.row + c[None, :], (d < D)[:, None] & (c < channels)[None, :], 0.0)
        m_cp = (c < channels)[:, None] & m_p[None, :]
        if INT64_OFFSETS:
            c = c.to(tl.int64)
        b_v = tl.load(p_x + c[:, None] * x.channel + p[None, :] * x.position, m_cp, 0.0).to(ACC)
        if subtracted is not None:
            o = c[:, None] * subtracted.channel + p[None, :] * subtracted.position
            b_v -= tl.load(p_subtracted + o, m_cp, 0.0).to(ACC)
        acc = dot(b_w, cast_rn(b_v, b_w.dtype), acc, PRECISION)

    acc, last = sum_split(acc, partials, arrivals, tile, part, SPLIT)
    if last:
        m_dp = (d < D)[:, None] & (p < P)[None, :]
        p_u = u + frame_clip.to(tl.int64) * (D * P) + d[:, None] * P + p[None, :]
        if ACCUMULATE:
            acc += tl.load(p_u, m_dp, 0.0)
        tl.store(p_u, acc, m_dp)
        if statistics.mean is not None:
            _tile_statistics(acc, tile_statistics, statistics, arrivals, tile, d, m_dp, clips_per_group, D, P)


@triton.jit
def _tile_statistics(
    acc, tile_statistics, statistics, arrivals, tile, d, m_dp, clips_per_group, D: tl.constexpr, P: tl.constexpr
):
    """Store mean and sum of squares of a tile of U; the group's last tile merges them."""
    BLOCK_D: tl.constexpr = acc.shape[0]
    BLOCK_P: tl.constexpr = acc.shape[1]
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    P_TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    p_tile = tile // D_TILES
    count = tl.minimum(P - p_tile % P_TILES * BLOCK_P, BLOCK_P)
    mean = tl.sum(tl.where(m_dp, acc, 0.0), 1) / count
    difference = tl.where(m_dp, acc - mean[:, None], 0.0)
    tl.store(tile_statistics.mean + p_tile * D + d, mean, d < D)
    tl.store(tile_statistics.square + p_tile * D + d, tl.sum(difference * difference, 1), d < D)
    group = p_tile // P_TILES // clips_per_group
    tiles = clips_per_group * P_TILES
    if grid_last_arrival(arrivals + tl.num_programs(0) + group * D_TILES + tile % D_TILES, tiles):
        _merge_statistics(tile_statistics, statistics, group, tiles, d, D, P, BLOCK_P)


@triton.jit
def _merge_statistics(
    tile_statistics, statistics, group, tiles, d, D: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Compute a group's mean and biased variance from those of its tiles, in their order."""
    ACC: tl.constexpr = tile_statistics.mean.dtype.element_ty
    BLOCK: tl.constexpr = 16
    P_TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    first = group * tiles
    elements = (tiles // P_TILES * P).to(ACC)
    total = tl.zeros_like(d).to(ACC)
    for i0 in range(0, tiles, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        m = (i < tiles)[:, None] & (d < D)[None, :]
        o = (first + i)[:, None] * D + d[None, :]
        count = tl.minimum(P - i % P_TILES * BLOCK_P, BLOCK_P).to(ACC)
        total += tl.sum(tl.load(tile_statistics.mean + o, m, 0.0, cache_modifier=".cg") * count[:, None], 0)
    mean = total / elements
    square = tl.zeros_like(d).to(ACC)
    for i0 in range(0, tiles, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        m = (i < tiles)[:, None] & (d < D)[None, :]
        o = (first + i)[:, None] * D + d[None, :]
        count = tl.minimum(P - i % P_TILES * BLOCK_P, BLOCK_P).to(ACC)
        difference = tl.load(tile_statistics.mean + o, m, 0.0, cache_modifier=".cg") - mean[None, :]
        b_square = tl.load(tile_statistics.square + o, m, 0.0, cache_modifier=".cg")
        b_square += difference * difference * count[:, None]
        square += tl.sum(tl.where(m, b_square, 0.0), 0)
    tl.store(statistics.mean + group * D + d, mean, d < D)
    tl.store(statistics.var + group * D + d, square / elements, d < D)


@triton.jit(do_not_specialize=["t"])
def refine_fwd_gate_kernel(
    out,  # StridedMaps, S_t (B, C, P), out, P contiguous
    state,  # S_t in fp32 if `out` has 16 bits, read and written (B, C, P); or None
    strips,  # (B, C, H), sums of S over time and width, read and written
    x,  # StridedMaps, X_t (B, C, P)
    s,  # StridedMaps, S_{t-1} (B, C, P); None at the first frame, where S = X
    u,  # U_t (B, D, P)
    statistics,  # Statistics, each (groups, D)
    gate,  # GateWeights
    attention,  # AttentionVectors, out; z_c is None only without channel attention
    lengths,  # (B,), or None
    t,
    channels,
    clips_per_group,
    D: tl.constexpr,
    A: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    EPS: tl.constexpr,
    FIRST: tl.constexpr,  # the first frame to be added to the strips
    INT64_OFFSETS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute the attention from a clip's U, then S_t = S_{t-1} + Z (X_t - S_{t-1}); a program has CHUNK channels."""
    ACC: tl.constexpr = strips.dtype.element_ty
    P: tl.constexpr = H * W
    BLOCK_H: tl.constexpr = triton.next_power_of_2(H)
    BLOCK_W: tl.constexpr = triton.next_power_of_2(W)
    Q: tl.constexpr = BLOCK_H * BLOCK_W  # positions, with rows and columns padded to powers of 2
    clip = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    q = tl.arange(0, Q)
    row = q // BLOCK_W
    column = q % BLOCK_W
    p = row * W + column
    m_p = (row < H) & (column < W)

    SPATIAL: tl.constexpr = gate.w_s1 is not None
    CHANNEL: tl.constexpr = gate.w_c is not None
    z_s = tl.zeros([Q], ACC)
    if s is not None:
        p_u = u + clip * (D * P)
        mean = statistics.mean + clip // clips_per_group * D
        var = statistics.var + clip // clips_per_group * D
        pooled = tl.zeros([Q], ACC)
        c_all = begin + tl.arange(0, CHUNK)
        m_all = c_all < channels
        z_c = tl.zeros([CHUNK], ACC)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            m_dp = (d < D)[:, None] & m_p[None, :]
            _, y, _ = normalize(p_u, mean, var, gate, d, p, m_dp, D, P, EPS)  # [BLOCK_D, Q]
            pooled += tl.sum(y, 0)
            if CHANNEL:
                o = c_all.to(tl.int64)[:, None] * D + d[None, :]
                b_w = tl.load(gate.w_c + o, m_all[:, None] & (d < D)[None, :], 0.0)  # [CHUNK, BLOCK_D]
                z_c += tl.sum(b_w.to(ACC) * (tl.sum(y, 1) / P)[None, :], 1)
        if SPATIAL:
            pooled = pooled / D
            for a0 in range(0, A, BLOCK_A):
                a = a0 + tl.arange(0, BLOCK_A)
                b_w = tl.load(gate.w_s1 + a[:, None] * P + p[None, :], (a < A)[:, None] & m_p[None, :], 0.0)
                b_h = tl.sum(b_w.to(ACC) * pooled[None, :], 1)
                b_h = tl.where(b_h <= 0, 0.0, b_h)  # keeps a NaN
                if attention.h is not None and begin == 0:
                    tl.store(attention.h + clip * A + a, b_h, a < A)
                b_w = tl.load(gate.w_s2 + p[:, None] * A + a[None, :], m_p[:, None] & (a < A)[None, :], 0.0)
                z_s += tl.sum(b_w.to(ACC) * b_h[None, :], 1)
            if attention.z_s is not None and begin == 0:
                tl.store(attention.z_s + clip * P + p, z_s, m_p)
        if CHANNEL:
            p_z_c = attention.z_c + clip * channels
            tl.store(p_z_c + c_all, z_c, m_all)
            tl.debug_barrier()  # other threads read it back below

    p_x = x.ptr + clip * x.clip
    p_out = out.ptr + clip * out.clip
    if s is not None:
        p_s = s.ptr + clip * s.clip
    for c0 in range(begin, tl.minimum(begin + CHUNK, channels), BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        m_c = c < channels
        m_cp = m_c[:, None] & m_p[None, :]
        p_strips = strips + (clip * channels + c)[:, None] * H + tl.arange(0, BLOCK_H)[None, :]
        if INT64_OFFSETS:
            c = c.to(tl.int64)
        m_len = m_cp
        if lengths is not None:
            m_len = m_cp & (t < tl.load(lengths + clip))
        b_s = tl.load(p_x + c[:, None] * x.channel + p[None, :] * x.position, m_len, 0.0).to(ACC)
        if s is not None:
            past = tl.load(p_s + c[:, None] * s.channel + p[None, :] * s.position, m_cp, 0.0).to(ACC)
            if not CHANNEL:
                logits = tl.broadcast_to(z_s[None, :], BLOCK_C, Q)
            elif not SPATIAL:
                logits = tl.broadcast_to(tl.load(p_z_c + c, m_c, 0.0)[:, None], BLOCK_C, Q)
            else:
                logits = tl.load(p_z_c + c, m_c, 0.0)[:, None] * z_s[None, :]
            b_s = past + tl.sigmoid(logits) * (b_s - past)  # eq. 4, 5
        o = c[:, None] * P + p[None, :]
        if state is not None:
            # S_{t-1} was read from there; a block smaller than the program's threads is read by several of them.
            tl.debug_barrier()
            tl.store(state + clip * channels * P + o, b_s, m_cp)
        b_s = tl.where(m_len, b_s, 0.0)
        tl.store(p_out + o, cast_rn(b_s, out.ptr.dtype.element_ty), m_cp)
        b_strips = tl.sum(tl.reshape(b_s, (BLOCK_C, BLOCK_H, BLOCK_W)), 2)  # [BLOCK_C, BLOCK_H]
        m_strips = m_c[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :]
        if not FIRST:
            b_strips += tl.load(p_strips, m_strips, 0.0)
        tl.store(p_strips, b_strips, m_strips)
