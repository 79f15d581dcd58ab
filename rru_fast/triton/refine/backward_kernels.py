"""The backward kernels of `refine`. Four launches per frame, from the last frame to the first:

- `maps` ends frame t + 1, whose dU is known by then, and begins frame t: the gradient G_t that reaches S_t, and from
  dL = G A Z (1 - Z), the gradient of the logits z_c z_s^T, the sums dz_s and dz_c;
- `pooled_backward` computes W_c^T dz_c for all clips at once, so that w_c is read once and not once per clip;
- `gate_backward` computes dY = (a[p] + b[d]) [Y > 0], a = W_s1^T dh / D, b = W_c^T dz_c / P, and the norm's sums;
- `norm_backward` computes dU from dY.

What the motion brings to dX, W_m^T (dU_t - dU_{t+1}), is computed where dX is: deferred to a product of its own it
would cost reading and writing dX once more. The weights' gradients are deferred: `weight_gradient` and `outer`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import last_to_arrive, narrowed, normalise, product


@triton.jit
def _z(z_s, z_c, clip, channels, c, p, here, P: tl.constexpr):
    """Z of a clip [BLOCK_C, BLOCK_P] from what the forward kept."""
    if z_s is None:
        logits = tl.broadcast_to(tl.load(z_c + clip * channels + c, here, 0.0)[:, None], c.shape[0], p.shape[0])
    elif z_c is None:
        logits = tl.broadcast_to(tl.load(z_s + clip * P + p, p < P, 0.0)[None, :], c.shape[0], p.shape[0])
    else:
        v_c = tl.load(z_c + clip * channels + c, here, 0.0)
        logits = v_c[:, None] * tl.load(z_s + clip * P + p, p < P, 0.0)[None, :]
    return tl.sigmoid(logits)


@triton.jit(do_not_specialize=["t"])
def maps_kernel(
    g,  # G_{t+1} in, G_t out (B, C, P)
    d_x,  # dX_{t+1}, out (B, C, P), P contiguous; or None: nothing to end, or not needed
    d_x_first,  # dX_t, out, in place of G_t where frame t is the first of all; or None
    d_x_clip,
    du,  # dU_{t+1} (B, D, P); or None: t + 1 has no gate, nothing reaches it but G
    du_next,  # dU_{t+2}, or None
    w_s,  # (D, C): W_a or W_p; their sum with W_m where SHARED
    w_s_gate,
    w_x,  # (D, C): W_m or W_x; or None
    w_x_gate,
    done_z_s,  # of frame t + 1 (B, P), or None
    done_z_c,  # of frame t + 1 (B, C), or None
    d_features,  # at t (B, C, P), or None
    d_features_clip,
    d_features_channel,
    d_features_position,
    d_strips,  # (B, C, H) over T W, or None
    x,  # X_t (B, C, P), or None where t has no gate
    x_clip,
    x_channel,
    x_position,
    s,  # S_{t-1}
    s_clip,
    s_channel,
    s_position,
    z_s,  # (B, P), or None
    z_c,  # (B, C), or None
    d_z_s,  # (B, blocks, P), out: a sum over each block of channels; or None
    d_z_c,  # (B, C), out; or None
    lengths,  # (B,), or None
    t,
    channels,
    D: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    END: tl.constexpr,  # whether there is a frame t + 1
    BEGIN: tl.constexpr,  # whether there is a frame t
    RAW: tl.constexpr,
    SHARED: tl.constexpr,  # A = M at frame t + 1, the first with a gate
    DOT: tl.constexpr,  # type of the products' factors
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_C channels of a clip per program."""
    SUM: tl.constexpr = g.dtype.element_ty
    # Rows of d_strips are read once and repeated, not read once per position.
    ROWS: tl.constexpr = BLOCK_P // W if BLOCK_P % W == 0 else 0
    SPATIAL: tl.constexpr = z_s is not None
    CHANNEL: tl.constexpr = z_c is not None
    clip = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    narrow = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c = narrow.to(tl.int64) if WIDE else narrow
    here = c < channels
    g += clip * channels * P
    if d_x is not None:
        d_x += clip * d_x_clip
    if d_x_first is not None:
        d_x_first += clip * d_x_clip
    if du is not None:
        du += clip * (D * P)
    if du_next is not None:
        du_next += clip * (D * P)
    if d_features is not None:
        d_features += clip * d_features_clip
    if d_strips is not None:
        d_strips += clip * channels * (P // W)
    if x is not None:
        x += clip * x_clip
        s += clip * s_clip
    alive = True
    if lengths is not None:
        alive = t < tl.load(lengths + clip)

    sum_c = tl.zeros([BLOCK_C], SUM)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = here[:, None] & (p < P)[None, :]
        at = c[:, None] * P + p[None, :]
        carry = tl.zeros([BLOCK_C, BLOCK_P], SUM)
        if END:
            through_s = tl.zeros([BLOCK_C, BLOCK_P], SUM)
            through_x = tl.zeros([BLOCK_C, BLOCK_P], SUM)
            if du is not None or du_next is not None:
                for d0 in range(0, D, BLOCK_K):
                    d = d0 + tl.arange(0, BLOCK_K)
                    below = (d < D)[:, None] & (p < P)[None, :]
                    left = here[:, None] & (d < D)[None, :]
                    v = tl.zeros([BLOCK_K, BLOCK_P], SUM)
                    if du is not None:
                        v = tl.load(du + d[:, None] * P + p[None, :], below, 0.0)
                        weights = tl.load(w_s + narrow[:, None] + d[None, :] * w_s_gate, left, 0.0).to(DOT)
                        through_s = product(weights, narrowed(v, DOT), through_s, PRECISION)
                    if w_x is not None:
                        if SHARED:
                            v = tl.zeros([BLOCK_K, BLOCK_P], SUM)
                        if du_next is not None:
                            v -= tl.load(du_next + d[:, None] * P + p[None, :], below, 0.0)
                        weights = tl.load(w_x + narrow[:, None] + d[None, :] * w_x_gate, left, 0.0).to(DOT)
                        through_x = product(weights, narrowed(v, DOT), through_x, PRECISION)
            g_done = tl.load(g + at, inside, 0.0)
            zg = g_done
            if du is not None:
                zg = _z(done_z_s, done_z_c, clip, channels, c, p, here, P) * g_done
            if d_x is not None:
                through = through_x if RAW else through_s + through_x
                tl.store(d_x + at, narrowed(zg + through, d_x.dtype.element_ty), inside)
            carry = g_done - zg + (through_s if RAW else -through_s)
        if BEGIN:
            g_t = carry
            if d_features is not None:
                from_features = d_features + c[:, None] * d_features_channel + p[None, :] * d_features_position
                g_t += tl.load(from_features, inside & alive, 0.0).to(SUM)
            if d_strips is not None:
                if ROWS > 0:
                    row = p0 // W + tl.arange(0, ROWS)
                    m_row = here[:, None] & (row < P // W)[None, :] & alive
                    of_row = tl.load(d_strips + (c[:, None] * (P // W) + row[None, :]), m_row, 0.0).to(SUM)
                    of_row = tl.broadcast_to(of_row[:, :, None], BLOCK_C, ROWS, W)
                    g_t += tl.reshape(of_row, (BLOCK_C, BLOCK_P))
                else:
                    g_t += tl.load(d_strips + (c[:, None] * (P // W) + p[None, :] // W), inside & alive, 0.0).to(SUM)
            if d_x_first is not None:
                tl.store(d_x_first + at, narrowed(g_t, d_x_first.dtype.element_ty), inside)
            else:
                tl.store(g + at, g_t, inside)
            if x is not None:
                a = tl.load(x + c[:, None] * x_channel + p[None, :] * x_position, inside & alive, 0.0).to(SUM)
                a -= tl.load(s + c[:, None] * s_channel + p[None, :] * s_position, inside, 0.0).to(SUM)
                z = _z(z_s, z_c, clip, channels, c, p, here, P)
                dl = g_t * a * z * (1.0 - z)  # 0 outside, where g_t is
                if SPATIAL:
                    to_sum = dl
                    if CHANNEL:
                        to_sum = dl * tl.load(z_c + clip * channels + c, here, 0.0)[:, None]
                    tl.store(d_z_s + (clip * tl.num_programs(1) + block) * P + p, tl.sum(to_sum, 0), p < P)
                if CHANNEL:
                    if SPATIAL:
                        dl *= tl.load(z_s + clip * P + p, p < P, 0.0)[None, :]
                    sum_c += tl.sum(dl, 1)
    if BEGIN and x is not None and CHANNEL:
        tl.store(d_z_c + clip * channels + c, sum_c, here)


@triton.jit
def pooled_backward_kernel(
    d_pooled,  # (B, SPLIT, D), out: W_c^T dz_c over a part of the channels each
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
    """BLOCK_D gate channels of BLOCK_B clips, over a part of the channels, per program."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile = tl.program_id(0)
    part = tl.program_id(1)
    d = tile % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    clip = (tile // D_TILES * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    m_clip = (clip < clips)[:, None]
    acc = tl.zeros([BLOCK_B, BLOCK_D], d_pooled.dtype.element_ty)
    share = tl.cdiv(tl.cdiv(channels, BLOCK_K), SPLIT) * BLOCK_K
    for c0 in range(part * share, tl.minimum((part + 1) * share, channels), BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        v = tl.load(d_z_c + clip[:, None] * channels + c[None, :], m_clip & (c < channels)[None, :], 0.0)
        m_w = (c < channels)[:, None] & (d < D)[None, :]
        weights = tl.load(w_c + c.to(tl.int64)[:, None] * D + d[None, :], m_w, 0.0).to(acc.dtype)
        acc = product(v, weights, acc, "ieee")
    tl.store(d_pooled + (clip[:, None] * SPLIT + part) * D + d[None, :], acc, m_clip & (d < D)[None, :])


@triton.jit
def gate_backward_kernel(
    d_z_s_blocks,  # (B, blocks, P), or None
    blocks,
    d_pooled_parts,  # (B, parts, D), or None
    parts,
    u,  # U_t (B, D, P)
    gamma,  # (D,)
    beta,  # (D,)
    mean,  # (groups, D)
    var,
    w_s1,  # (A, P), or None
    w_s2,  # (P, A), or None
    h,  # (B, A), or None
    a,  # (B, P), out: the part of dY that varies with the position, or None
    b,  # (B, D), out: the part that varies with the gate channel
    d_z_s,  # (B, P), out, or None
    d_h,  # (B, A), out, or None
    y_positions,  # (B, d tiles, P), out: sums of Y over a tile's gate channels, or None
    y_channels,  # (B, D), out: means of Y over positions, or None
    sum_dy,  # (B, D), out
    sum_dy_uhat,  # (B, D), out
    group_dy,  # (groups, D), out; None with running statistics
    group_dy_uhat,
    du,  # (B, D, P), out; None with batch statistics
    arrivals,  # (groups * d tiles,), zeros
    clips_per_group,
    D: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,  # all of P
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """A clip and BLOCK_D gate channels a program."""
    SUM: tl.constexpr = u.dtype.element_ty
    BLOCK: tl.constexpr = 8
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    SPATIAL: tl.constexpr = w_s1 is not None
    clip = tl.program_id(0).to(tl.int64)
    d_tile = tl.program_id(1)
    group = clip // clips_per_group
    d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    here = d < D
    live = p < P

    v_a = tl.zeros([BLOCK_P], SUM)
    if SPATIAL:
        v_z = tl.zeros([BLOCK_P], SUM)
        for i0 in range(0, blocks, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            inside = (i < blocks)[:, None] & live[None, :]
            v_z += tl.sum(tl.load(d_z_s_blocks + (clip * blocks + i)[:, None] * P + p[None, :], inside, 0.0), 0)
        if d_tile == 0:
            tl.store(d_z_s + clip * P + p, v_z, live)
        for a0 in range(0, A, BLOCK_A):
            i = a0 + tl.arange(0, BLOCK_A)
            weights = tl.load(w_s2 + p[:, None] * A + i[None, :], live[:, None] & (i < A)[None, :], 0.0).to(SUM)
            v_h = tl.load(h + clip * A + i, i < A, 0.0)
            v_h = tl.where(v_h > 0, tl.sum(weights * v_z[:, None], 0), 0.0)  # dh
            if d_tile == 0:
                tl.store(d_h + clip * A + i, v_h, i < A)
            weights = tl.load(w_s1 + i[:, None] * P + p[None, :], (i < A)[:, None] & live[None, :], 0.0).to(SUM)
            v_a += tl.sum(weights * v_h[:, None], 0)
        v_a = v_a / D
        if d_tile == 0:
            tl.store(a + clip * P + p, v_a, live)
    v_b = tl.zeros([BLOCK_D], SUM)
    if d_pooled_parts is not None:
        for i0 in range(0, parts, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            inside = (i < parts)[:, None] & here[None, :]
            v_b += tl.sum(tl.load(d_pooled_parts + (clip * parts + i)[:, None] * D + d[None, :], inside, 0.0), 0)
        v_b = v_b / P
    tl.store(b + clip * D + d, v_b, here)

    inside = here[:, None] & live[None, :]
    u += clip * (D * P)
    uhat, y, scale = normalise(u, mean + group * D, var + group * D, gamma, beta, d, p, inside, D, P, EPS)
    dy = tl.where(y > 0, v_a[None, :] + v_b[:, None], 0.0)
    if y_positions is not None:
        tl.store(y_positions + (clip * D_TILES + d_tile) * P + p, tl.sum(y, 0), live)
        tl.store(y_channels + clip * D + d, tl.sum(y, 1) / P, here)
    tl.store(sum_dy + clip * D + d, tl.sum(dy, 1), here)
    tl.store(sum_dy_uhat + clip * D + d, tl.sum(dy * uhat, 1), here)
    if group_dy is None:
        tl.store(du + clip * (D * P) + d[:, None] * P + p[None, :], dy * scale[:, None], inside)
    elif last_to_arrive(arrivals + group * D_TILES + d_tile, clips_per_group):
        total = tl.zeros([BLOCK_D], SUM)
        total_uhat = tl.zeros([BLOCK_D], SUM)
        for i0 in range(0, clips_per_group, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            at = (group * clips_per_group + i)[:, None] * D + d[None, :]
            own = (i < clips_per_group)[:, None] & here[None, :]
            total += tl.sum(tl.load(sum_dy + at, own, 0.0, cache_modifier=".cg"), 0)
            total_uhat += tl.sum(tl.load(sum_dy_uhat + at, own, 0.0, cache_modifier=".cg"), 0)
        tl.store(group_dy + group * D + d, total, here)
        tl.store(group_dy_uhat + group * D + d, total_uhat, here)


@triton.jit
def norm_backward_kernel(
    du,  # (B, D, P), out
    u,  # (B, D, P)
    gamma,  # (D,)
    beta,  # (D,)
    mean,  # (groups, D)
    var,
    a,  # (B, P), or None
    b,  # (B, D)
    group_dy,  # (groups, D)
    group_dy_uhat,
    elements,  # of each of these sums
    clips_per_group,
    D: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dU = gamma r (dY - mean(dY) - Uhat mean(dY Uhat)), means over the group; a clip and BLOCK_D rows a program."""
    SUM: tl.constexpr = u.dtype.element_ty
    clip = tl.program_id(0).to(tl.int64)
    group = clip // clips_per_group
    count = tl.full([], elements, SUM)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = d < D
    v_b = tl.load(b + clip * D + d, here, 0.0)
    mean_dy = tl.load(group_dy + group * D + d, here, 0.0) / count
    mean_dy_uhat = tl.load(group_dy_uhat + group * D + d, here, 0.0) / count
    u += clip * (D * P)
    du += clip * (D * P)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = here[:, None] & (p < P)[None, :]
        uhat, y, scale = normalise(u, mean + group * D, var + group * D, gamma, beta, d, p, inside, D, P, EPS)
        v_a = tl.zeros([BLOCK_P], SUM)
        if a is not None:
            v_a = tl.load(a + clip * P + p, p < P, 0.0)
        dy = tl.where(y > 0, v_a[None, :] + v_b[:, None], 0.0)
        dy = (dy - mean_dy[:, None] - uhat * mean_dy_uhat[:, None]) * scale[:, None]
        tl.store(du + d[:, None] * P + p[None, :], dy, inside)
