"""Backward kernels of `refine`. Four launches per frame, from the last frame to the first:

- `refine_bwd_recurrence` ends frame t + 1, whose dU is known by then, and begins frame t: the gradient G_t that reaches
  S_t, and from dL = G A Z (1 - Z), the gradient of the logits z_c z_s^T, the sums dz_s and dz_c;
- `refine_bwd_pooled` computes W_c^T dz_c for all clips at once, so that w_c is read once and not once per clip;
- `refine_bwd_gate` computes dY = (a[p] + b[d]) [Y > 0], a = W_s1^T dh / D, b = W_c^T dz_c / P, and the norm's sums;
- `refine_bwd_norm` computes dU from dY.

The part of dX through the motion, W_m^T (dU_t - dU_{t+1}), is computed with the rest of dX: as a product of its own it
would read and write dX once more. The weights' gradients are computed once all dU are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import cast_rn, dot, grid_last_arrival, normalize


@triton.jit
def _gate(attention, clip, channels, c, p, m_c, P: tl.constexpr):
    """Recompute Z of a clip, [BLOCK_C, BLOCK_P], from the saved attention vectors."""
    if attention.z_s is None:
        logits = tl.broadcast_to(
            tl.load(attention.z_c + clip * channels + c, m_c, 0.0)[:, None], c.shape[0], p.shape[0]
        )
    elif attention.z_c is None:
        logits = tl.broadcast_to(tl.load(attention.z_s + clip * P + p, p < P, 0.0)[None, :], c.shape[0], p.shape[0])
    else:
        z_c = tl.load(attention.z_c + clip * channels + c, m_c, 0.0)
        logits = z_c[:, None] * tl.load(attention.z_s + clip * P + p, p < P, 0.0)[None, :]
    return tl.sigmoid(logits)


@triton.jit(do_not_specialize=["t"])
def refine_bwd_recurrence_kernel(
    g,  # G_{t+1} in, G_t out (B, C, P)
    following,  # Following: tensors of frame t + 1, and dU of the one after it
    frame,  # Frame: tensors of frame t
    w_recurrent,  # StridedMatrix (D, C); if SHARED, the sum of both halves of w
    w_input,  # StridedMatrix (D, C), or None
    lengths,  # (B,), or None
    t,
    channels,
    D: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    HAS_NEXT: tl.constexpr,  # there is a frame t + 1 to end
    HAS_FRAME: tl.constexpr,  # there is a frame t to begin
    RAW: tl.constexpr,
    SHARED: tl.constexpr,  # A = M at frame t + 1, the first with a gate
    OPERAND_DTYPE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """End frame t + 1 and begin frame t; a program has BLOCK_C channels of a clip."""
    ACC: tl.constexpr = g.dtype.element_ty
    # Rows of d_strips are loaded once and repeated, not loaded once per position.
    ROWS: tl.constexpr = BLOCK_P // W if BLOCK_P % W == 0 else 0
    SPATIAL: tl.constexpr = frame.attention.z_s is not None
    CHANNEL: tl.constexpr = frame.attention.z_c is not None
    clip = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    c_int32 = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c = c_int32.to(tl.int64) if INT64_OFFSETS else c_int32
    m_c = c < channels
    p_g = g + clip * channels * P
    if following.d_x is not None:
        p_d_x = following.d_x.ptr + clip * following.d_x.clip
    if following.du is not None:
        p_du = following.du + clip * (D * P)
    if following.du_next is not None:
        p_du_next = following.du_next + clip * (D * P)
    if frame.d_x is not None:
        p_d_x_first = frame.d_x.ptr + clip * frame.d_x.clip
    if frame.d_features is not None:
        p_d_features = frame.d_features.ptr + clip * frame.d_features.clip
    if frame.d_strips is not None:
        p_d_strips = frame.d_strips + clip * channels * (P // W)
    if frame.x is not None:
        p_x = frame.x.ptr + clip * frame.x.clip
        p_s = frame.s.ptr + clip * frame.s.clip
    m_len = True
    if lengths is not None:
        m_len = t < tl.load(lengths + clip)

    d_z_c = tl.zeros([BLOCK_C], ACC)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        m_p = p < P
        m_cp = m_c[:, None] & m_p[None, :]
        o = c[:, None] * P + p[None, :]
        carry = tl.zeros([BLOCK_C, BLOCK_P], ACC)
        if HAS_NEXT:
            through_s = tl.zeros([BLOCK_C, BLOCK_P], ACC)
            through_x = tl.zeros([BLOCK_C, BLOCK_P], ACC)
            if following.du is not None or following.du_next is not None:
                for d0 in range(0, D, BLOCK_K):
                    d = d0 + tl.arange(0, BLOCK_K)
                    o_du = d[:, None] * P + p[None, :]
                    m_dp = (d < D)[:, None] & m_p[None, :]
                    m_w = m_c[:, None] & (d < D)[None, :]
                    b_du = tl.zeros([BLOCK_K, BLOCK_P], ACC)
                    if following.du is not None:
                        b_du = tl.load(p_du + o_du, m_dp, 0.0)
                        p_w = w_recurrent.ptr + c_int32[:, None] + d[None, :] * w_recurrent.row
                        b_w = tl.load(p_w, m_w, 0.0).to(OPERAND_DTYPE)
                        through_s = dot(b_w, cast_rn(b_du, OPERAND_DTYPE), through_s, PRECISION)
                    if w_input is not None:
                        if SHARED:
                            b_du = tl.zeros([BLOCK_K, BLOCK_P], ACC)
                        if following.du_next is not None:
                            b_du -= tl.load(p_du_next + o_du, m_dp, 0.0)
                        p_w = w_input.ptr + c_int32[:, None] + d[None, :] * w_input.row
                        b_w = tl.load(p_w, m_w, 0.0).to(OPERAND_DTYPE)
                        through_x = dot(b_w, cast_rn(b_du, OPERAND_DTYPE), through_x, PRECISION)
            g_next = tl.load(p_g + o, m_cp, 0.0)
            zg = g_next
            if following.du is not None:
                zg = _gate(following.attention, clip, channels, c, p, m_c, P) * g_next
            if following.d_x is not None:
                through = through_x if RAW else through_s + through_x
                tl.store(p_d_x + o, cast_rn(zg + through, following.d_x.ptr.dtype.element_ty), m_cp)
            carry = g_next - zg + (through_s if RAW else -through_s)
        if HAS_FRAME:
            b_g = carry
            if frame.d_features is not None:
                o_features = c[:, None] * frame.d_features.channel + p[None, :] * frame.d_features.position
                b_g += tl.load(p_d_features + o_features, m_cp & m_len, 0.0).to(ACC)
            if frame.d_strips is not None:
                if ROWS > 0:
                    row = p0 // W + tl.arange(0, ROWS)
                    m_row = m_c[:, None] & (row < P // W)[None, :] & m_len
                    b_strips = tl.load(p_d_strips + (c[:, None] * (P // W) + row[None, :]), m_row, 0.0).to(ACC)
                    b_strips = tl.broadcast_to(b_strips[:, :, None], BLOCK_C, ROWS, W)
                    b_g += tl.reshape(b_strips, (BLOCK_C, BLOCK_P))
                else:
                    o_strips = c[:, None] * (P // W) + p[None, :] // W
                    b_g += tl.load(p_d_strips + o_strips, m_cp & m_len, 0.0).to(ACC)
            if frame.d_x is not None:
                tl.store(p_d_x_first + o, cast_rn(b_g, frame.d_x.ptr.dtype.element_ty), m_cp)
            else:
                tl.store(p_g + o, b_g, m_cp)
            if frame.x is not None:
                o_x = c[:, None] * frame.x.channel + p[None, :] * frame.x.position
                a = tl.load(p_x + o_x, m_cp & m_len, 0.0).to(ACC)
                a -= tl.load(p_s + c[:, None] * frame.s.channel + p[None, :] * frame.s.position, m_cp, 0.0).to(ACC)
                z = _gate(frame.attention, clip, channels, c, p, m_c, P)
                dl = b_g * a * z * (1.0 - z)  # 0 where G is masked
                if SPATIAL:
                    terms = dl
                    if CHANNEL:
                        terms = dl * tl.load(frame.attention.z_c + clip * channels + c, m_c, 0.0)[:, None]
                    tl.store(frame.d_z_s + (clip * tl.num_programs(1) + block) * P + p, tl.sum(terms, 0), m_p)
                if CHANNEL:
                    if SPATIAL:
                        dl *= tl.load(frame.attention.z_s + clip * P + p, m_p, 0.0)[None, :]
                    d_z_c += tl.sum(dl, 1)
    if HAS_FRAME and frame.x is not None and CHANNEL:
        tl.store(frame.d_z_c + clip * channels + c, d_z_c, m_c)


@triton.jit
def refine_bwd_pooled_kernel(
    d_pooled,  # (B, SPLIT, D), out: W_c^T dz_c, each over a part of the channels
    d_z_c,  # (B, C)
    w_c,  # (C, D)
    clips,
    channels,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute W_c^T dz_c; a program has BLOCK_D gate channels of BLOCK_B clips, over a part of the channels."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile = tl.program_id(0)
    part = tl.program_id(1)
    d = tile % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    clip = (tile // D_TILES * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    m_clip = (clip < clips)[:, None]
    acc = tl.zeros([BLOCK_B, BLOCK_D], d_pooled.dtype.element_ty)
    terms = tl.cdiv(tl.cdiv(channels, BLOCK_K), SPLIT) * BLOCK_K
    for c0 in range(part * terms, tl.minimum((part + 1) * terms, channels), BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        b_d_z = tl.load(d_z_c + clip[:, None] * channels + c[None, :], m_clip & (c < channels)[None, :], 0.0)
        m_w = (c < channels)[:, None] & (d < D)[None, :]
        b_w = tl.load(w_c + c.to(tl.int64)[:, None] * D + d[None, :], m_w, 0.0).to(acc.dtype)
        acc = dot(b_d_z, b_w, acc, "ieee")
    tl.store(d_pooled + (clip[:, None] * SPLIT + part) * D + d[None, :], acc, m_clip & (d < D)[None, :])


@triton.jit
def _sum_parts(parts, clip, i, m_i, SIZE: tl.constexpr):
    """Sum a clip's parts, (B, num_parts, SIZE), at indices i, in their order."""
    BLOCK: tl.constexpr = 8
    acc = tl.zeros_like(i).to(parts.ptr.dtype.element_ty)
    for n0 in range(0, parts.num_parts, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        o = (clip * parts.num_parts + n)[:, None] * SIZE + i[None, :]
        acc += tl.sum(tl.load(parts.ptr + o, (n < parts.num_parts)[:, None] & m_i[None, :], 0.0), 0)
    return acc


@triton.jit
def refine_bwd_gate_kernel(
    d_z_s_parts,  # Parts (B, num_parts, P), sums over blocks of channels; or None
    d_pooled_parts,  # Parts (B, num_parts, D), or None
    u,  # U_t (B, D, P)
    statistics,  # Statistics, each (groups, D)
    gate,  # GateWeights
    h,  # (B, A), or None
    d_attention,  # Attention, out: h and z_s; or None for both
    d_y,  # DY, out
    y_means,  # YMeans, out; or None for both
    sums,  # NormSums, each (B, D), out
    group_sums,  # NormSums, each (groups, D), out; None for both with running statistics
    du,  # (B, D, P), out; None with batch statistics
    arrivals,  # (groups * d tiles,), zeros
    clips_per_group,
    D: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,  # all positions
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Compute dY from dz_s and dz_c, and the norm's sums; a program has BLOCK_D gate channels of a clip."""
    ACC: tl.constexpr = u.dtype.element_ty
    BLOCK: tl.constexpr = 8
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    clip = tl.program_id(0).to(tl.int64)
    d_tile = tl.program_id(1)
    group = clip // clips_per_group
    d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    m_d = d < D
    m_p = p < P

    b_a = tl.zeros([BLOCK_P], ACC)
    if gate.w_s1 is not None:
        d_z_s = _sum_parts(d_z_s_parts, clip, p, m_p, P)
        if d_tile == 0:
            tl.store(d_attention.z_s + clip * P + p, d_z_s, m_p)
        for a0 in range(0, A, BLOCK_A):
            i = a0 + tl.arange(0, BLOCK_A)
            b_w = tl.load(gate.w_s2 + p[:, None] * A + i[None, :], m_p[:, None] & (i < A)[None, :], 0.0).to(ACC)
            b_h = tl.load(h + clip * A + i, i < A, 0.0)
            d_h = tl.where(b_h > 0, tl.sum(b_w * d_z_s[:, None], 0), 0.0)
            if d_tile == 0:
                tl.store(d_attention.h + clip * A + i, d_h, i < A)
            b_w = tl.load(gate.w_s1 + i[:, None] * P + p[None, :], (i < A)[:, None] & m_p[None, :], 0.0).to(ACC)
            b_a += tl.sum(b_w * d_h[:, None], 0)
        b_a = b_a / D
        if d_tile == 0:
            tl.store(d_y.a + clip * P + p, b_a, m_p)
    b_b = tl.zeros([BLOCK_D], ACC)
    if d_pooled_parts is not None:
        b_b = _sum_parts(d_pooled_parts, clip, d, m_d, D) / P
    tl.store(d_y.b + clip * D + d, b_b, m_d)

    m_dp = m_d[:, None] & m_p[None, :]
    mean = statistics.mean + group * D
    var = statistics.var + group * D
    uhat, y, scale = normalize(u + clip * (D * P), mean, var, gate, d, p, m_dp, D, P, EPS)
    dy = tl.where(y > 0, b_a[None, :] + b_b[:, None], 0.0)
    if y_means.positions is not None:
        tl.store(y_means.positions + (clip * D_TILES + d_tile) * P + p, tl.sum(y, 0), m_p)
        tl.store(y_means.channels + clip * D + d, tl.sum(y, 1) / P, m_d)
    tl.store(sums.dy + clip * D + d, tl.sum(dy, 1), m_d)
    tl.store(sums.dy_uhat + clip * D + d, tl.sum(dy * uhat, 1), m_d)
    if group_sums.dy is None:
        tl.store(du + clip * (D * P) + d[:, None] * P + p[None, :], dy * scale[:, None], m_dp)
    elif grid_last_arrival(arrivals + group * D_TILES + d_tile, clips_per_group):
        sum_dy = tl.zeros([BLOCK_D], ACC)
        sum_dy_uhat = tl.zeros([BLOCK_D], ACC)
        for i0 in range(0, clips_per_group, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            o = (group * clips_per_group + i)[:, None] * D + d[None, :]
            m = (i < clips_per_group)[:, None] & m_d[None, :]
            sum_dy += tl.sum(tl.load(sums.dy + o, m, 0.0, cache_modifier=".cg"), 0)
            sum_dy_uhat += tl.sum(tl.load(sums.dy_uhat + o, m, 0.0, cache_modifier=".cg"), 0)
        tl.store(group_sums.dy + group * D + d, sum_dy, m_d)
        tl.store(group_sums.dy_uhat + group * D + d, sum_dy_uhat, m_d)


@triton.jit
def refine_bwd_norm_kernel(
    du,  # (B, D, P), out
    u,  # (B, D, P)
    statistics,  # Statistics, each (groups, D)
    gate,  # GateWeights
    d_y,  # DY
    group_sums,  # NormSums, each (groups, D)
    elements,  # of each of these sums
    clips_per_group,
    D: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute dU = gamma r (dY - mean(dY) - Uhat mean(dY Uhat)), means over the group; a program has BLOCK_D rows."""
    ACC: tl.constexpr = u.dtype.element_ty
    clip = tl.program_id(0).to(tl.int64)
    group = clip // clips_per_group
    count = tl.full([], elements, ACC)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = d < D
    b_b = tl.load(d_y.b + clip * D + d, m_d, 0.0)
    mean_dy = tl.load(group_sums.dy + group * D + d, m_d, 0.0) / count
    mean_dy_uhat = tl.load(group_sums.dy_uhat + group * D + d, m_d, 0.0) / count
    p_u = u + clip * (D * P)
    p_du = du + clip * (D * P)
    mean = statistics.mean + group * D
    var = statistics.var + group * D
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        m_dp = m_d[:, None] & (p < P)[None, :]
        uhat, y, scale = normalize(p_u, mean, var, gate, d, p, m_dp, D, P, EPS)
        b_a = tl.zeros([BLOCK_P], ACC)
        if d_y.a is not None:
            b_a = tl.load(d_y.a + clip * P + p, p < P, 0.0)
        dy = tl.where(y > 0, b_a[None, :] + b_b[:, None], 0.0)
        dy = (dy - mean_dy[:, None] - uhat * mean_dy_uhat[:, None]) * scale[:, None]
        tl.store(p_du + d[:, None] * P + p[None, :], dy, m_dp)
