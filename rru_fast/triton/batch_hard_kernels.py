"""Kernels of `batch_hard_triplet`: mining and loss in one, and the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import cast_rn, dot

# Distances are sqrt(max(d2, FLOOR)). At the floor, up to rounding, their gradient is 0: coincident points have none.
FLOOR = tl.constexpr(1e-12)
AT_FLOOR = tl.constexpr(1e-6 * (1 + 1e-6))
NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _farther(v, i, w, j):
    """Return the larger of two distances and its index: NaN is the largest, and of equals the lowest index wins."""
    take = (w > v) | ((w != w) & (v == v)) | (((w == v) | ((w != w) & (v != v))) & (j < i))
    return tl.where(take, w, v), tl.where(take, j, i)


@triton.jit
def _farthest(key, index, candidate):
    """Return each row's largest candidate in the order of `_farther`, and its index; -inf and NO_INDEX without any."""
    v = tl.max(tl.where(candidate & (key == key), key, float("-inf")), 1)
    i = tl.min(tl.where(candidate & (key == v[:, None]), index, NO_INDEX), 1)
    i_nan = tl.min(tl.where(candidate & (key != key), index, NO_INDEX), 1)
    return tl.where(i_nan == NO_INDEX, v, float("nan")), tl.where(i_nan == NO_INDEX, i, i_nan)


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)); log1p by its first-order correction."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def _load_rows(p_group, features, index, k, m_row, D: tl.constexpr):
    """Load rows `index` and columns `k` of the group at p_group, in the dtype of the features."""
    o = index.to(tl.int64)[:, None] * features.row + k[None, :] * features.column
    return tl.load(p_group + o, m_row[:, None] & (k < D)[None, :], 0.0)


@triton.jit
def _distance(square, inner, COSINE: tl.constexpr):
    if COSINE:
        return 1.0 - inner
    else:
        return tl.sqrt(tl.where(square < FLOOR, FLOOR, square))  # keeps a NaN


@triton.jit
def _median(a, b, c):
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _median_feature(p_group, features, i: tl.constexpr, n, k, D: tl.constexpr, ACC: tl.constexpr):
    """Return, in each of the columns k, the median of features i, i + 3 and i + 6 of nine evenly spaced ones."""
    p_column = p_group + k * features.column
    m_k = k < D
    n = tl.zeros([1], tl.int64) + n
    return _median(
        tl.load(p_column + i * n // 9 * features.row, m_k, 0.0).to(ACC),
        tl.load(p_column + (i + 3) * n // 9 * features.row, m_k, 0.0).to(ACC),
        tl.load(p_column + (i + 6) * n // 9 * features.row, m_k, 0.0).to(ACC),
    )


@triton.jit
def _median_and_range(p_group, features, n, k, D: tl.constexpr, ACC: tl.constexpr):
    """Return, in each of the columns k, median and range of three medians of three features each."""
    v0 = _median_feature(p_group, features, 0, n, k, D, ACC)
    v1 = _median_feature(p_group, features, 1, n, k, D, ACC)
    v2 = _median_feature(p_group, features, 2, n, k, D, ACC)
    return _median(v0, v1, v2), tl.maximum(tl.maximum(v0, v1), v2) - tl.minimum(tl.minimum(v0, v1), v2)


@triton.jit
def subtract_common_kernel(
    ranked,  # (G, N, D), out, contiguous
    features,  # StridedFeatures (G, N, D)
    n,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Subtract a vector that most of a group's features share; a program has BLOCK_N features and BLOCK_K columns.

    Distances do not change, but |b|^2 - 2 ab no longer cancels. The vector is the median of three medians of three
    features, if its square is 16 times that of their range, else 0: outliers neither shift nor hide it.
    """
    group = tl.program_id(1).to(tl.int64)
    p_group = features.ptr + group * features.group
    square_median = tl.zeros([BLOCK_D], ACC)
    square_range = tl.zeros([BLOCK_D], ACC)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        b_median, b_range = _median_and_range(p_group, features, n, d, D, ACC)
        square_median += b_median * b_median
        square_range += b_range * b_range
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_median, _ = _median_and_range(p_group, features, n, k, D, ACC)
    common = tl.where(16 * tl.sum(square_range) < tl.sum(square_median), b_median, 0.0)
    v = _load_rows(p_group, features, i, k, i < n, D).to(ACC)
    v = v - common[None, :] + 0.0 * v  # makes infinite features NaN, and so their distances
    o = (group * n + i[:, None]) * D + k[None, :]
    tl.store(ranked + o, cast_rn(v, ranked.dtype.element_ty), (i < n)[:, None] & (k < D)[None, :])


@triton.jit
def batch_hard_fwd_kernel(
    loss,  # (G, N), out, as the next four
    d_pos,
    d_neg,
    positive,  # int64
    negative,  # int64
    features,  # StridedFeatures (G, N, D)
    ranked,  # StridedFeatures (G, N, D), the common vector subtracted; for mining alone
    labels,  # StridedVector (N,)
    n,
    margin: tl.float64,
    D: tl.constexpr,
    SOFT: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mine the two partners and compute the loss; a program has BLOCK_M anchors of a group, against all features."""
    ACC: tl.constexpr = loss.dtype.element_ty
    group = tl.program_id(1).to(tl.int64)
    p_features = features.ptr + group * features.group
    p_ranked = ranked.ptr + group * ranked.group
    a = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_a = a < n
    b_label = tl.load(labels.ptr + a.to(tl.int64) * labels.element, m_a, 0)
    farthest = tl.full([BLOCK_M], float("-inf"), ACC)
    nearest = tl.full([BLOCK_M], float("-inf"), ACC)  # negated
    i_farthest = tl.full([BLOCK_M], NO_INDEX, tl.int32)
    i_nearest = tl.full([BLOCK_M], NO_INDEX, tl.int32)
    for b0 in range(0, n, BLOCK_N):
        b = b0 + tl.arange(0, BLOCK_N)
        m_b = b < n
        inner = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        square = tl.zeros([BLOCK_N], ACC)
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            v = _load_rows(p_ranked, ranked, a, k, m_a, D)
            w = _load_rows(p_ranked, ranked, b, k, m_b, D)
            inner = dot(v, tl.trans(w), inner, PRECISION)
            if not COSINE:
                w = w.to(ACC)
                square += tl.sum(w * w, 1)
        # The distance's order, up to a constant of the anchor: |b|^2 - 2 ab, or -ab.
        key = -inner
        if not COSINE:
            key = square[None, :] + 2.0 * key
        same = b_label[:, None] == tl.load(labels.ptr + b.to(tl.int64) * labels.element, m_b, 0)[None, :]
        index = tl.broadcast_to(b[None, :], BLOCK_M, BLOCK_N)
        v, i = _farthest(key, index, same & m_b[None, :])
        farthest, i_farthest = _farther(farthest, i_farthest, v, i)
        v, i = _farthest(-key, index, (same == 0) & m_b[None, :])
        nearest, i_nearest = _farther(nearest, i_nearest, v, i)

    no_negative = i_nearest == NO_INDEX
    i_nearest = tl.where(no_negative, 0, i_nearest)
    i_farthest = tl.where(i_farthest == NO_INDEX, 0, i_farthest)  # past the last anchor
    pos_square = tl.zeros([BLOCK_M], ACC)
    neg_square = tl.zeros([BLOCK_M], ACC)
    pos_inner = tl.zeros([BLOCK_M], ACC)
    neg_inner = tl.zeros([BLOCK_M], ACC)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = _load_rows(p_features, features, a, k, m_a, D).to(ACC)
        w = _load_rows(p_features, features, i_farthest, k, m_a, D).to(ACC)
        pos_square += tl.sum((v - w) * (v - w), 1)
        pos_inner += tl.sum(v * w, 1)
        w = _load_rows(p_features, features, i_nearest, k, m_a, D).to(ACC)
        neg_square += tl.sum((v - w) * (v - w), 1)
        neg_inner += tl.sum(v * w, 1)
    # Propagate a NaN rank, which the difference of the two vectors alone may not have.
    b_pos = tl.where(farthest != farthest, farthest, _distance(pos_square, pos_inner, COSINE))
    b_neg = tl.where(nearest != nearest, nearest, _distance(neg_square, neg_inner, COSINE))
    b_neg = tl.where(no_negative, float("inf"), b_neg)
    gap = b_pos - b_neg
    if SOFT:
        b_loss = _softplus(gap)
    else:
        b_loss = tl.full([1], margin, ACC) + gap
        b_loss = tl.where(b_loss <= 0, 0.0, b_loss)  # keeps a NaN
    o = group * n + a
    tl.store(loss + o, b_loss, m_a)
    tl.store(d_pos + o, b_pos, m_a)
    tl.store(d_neg + o, b_neg, m_a)
    tl.store(positive + o, i_farthest.to(tl.int64), m_a)
    tl.store(negative + o, tl.where(no_negative, -1, i_nearest).to(tl.int64), m_a)


@triton.jit
def _partner_weights(d_loss, d_pos, d_neg, group, a, m_a, n, margin, SOFT: tl.constexpr, COSINE: tl.constexpr):
    """Return the factors of anchors a's vectors to their positive and to their negative in the gradient."""
    b_pos = tl.load(d_pos + group * n + a, m_a, 1.0)
    b_neg = tl.load(d_neg + group * n + a, m_a, float("inf"))
    weight = tl.load(d_loss.ptr + group * d_loss.group + a * d_loss.row, m_a, 0.0).to(b_pos.dtype)
    gap = b_pos - b_neg
    if SOFT:
        weight *= tl.sigmoid(gap)
    else:
        weight = weight * (tl.full([1], margin, b_pos.dtype) + gap > 0).to(b_pos.dtype)
    if COSINE:
        return weight, -weight
    else:
        to_pos = weight * (b_pos > AT_FLOOR).to(b_pos.dtype) / b_pos
        return to_pos, -weight * (b_neg > AT_FLOOR).to(b_pos.dtype) / b_neg


@triton.jit
def batch_hard_bwd_kernel(
    d_features,  # (G, N, D), out
    d_loss,  # StridedFeatures (G, N, 1)
    features,  # StridedFeatures (G, N, D)
    d_pos,  # (G, N), as the next three
    d_neg,
    positive,
    negative,
    choices,  # (G, 2 N): anchors that selected a positive, and N + those that selected a negative, sorted by partner
    begins,  # (G, N + 1): where the anchors that selected a feature begin in `choices`
    n,
    margin: tl.float64,
    D: tl.constexpr,
    ACC: tl.constexpr,
    SOFT: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather a feature's gradient, as anchor and as partner of others; a program has BLOCK_K of its columns."""
    i = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    p_features = features.ptr + group * features.group
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = k < D
    own = tl.load(p_features + i * features.row + k * features.column, m_k, 0.0).to(ACC)
    to_pos, to_neg = _partner_weights(d_loss, d_pos, d_neg, group, i, True, n, margin, SOFT, COSINE)
    i_pos = tl.load(positive + group * n + i)
    i_neg = tl.load(negative + group * n + i)
    b_pos = tl.load(p_features + i_pos * features.row + k * features.column, m_k, 0.0).to(ACC)
    b_neg = tl.load(p_features + i_neg * features.row + k * features.column, m_k & (i_neg >= 0), 0.0).to(ACC)
    acc = (own - b_pos) * to_pos + (own - b_neg) * to_neg
    if COSINE:
        acc = -(b_pos * to_pos) - b_neg * to_neg
    begin = tl.load(begins + group * (n + 1) + i)
    end = tl.load(begins + group * (n + 1) + i + 1)
    for e0 in range(begin, end, BLOCK_A):
        e = e0 + tl.arange(0, BLOCK_A)
        m_e = e < end
        choice = tl.load(choices + group * (2 * n) + e, m_e, 0)
        a = choice % n
        as_pos, as_neg = _partner_weights(d_loss, d_pos, d_neg, group, a, m_e, n, margin, SOFT, COSINE)
        weight = tl.where(m_e, tl.where(choice < n, as_pos, as_neg), 0.0)
        v = _load_rows(p_features, features, a, k, m_e, D).to(ACC)
        difference = own[None, :] - v
        if COSINE:
            difference = -v
        v = difference * weight[:, None]
        acc += tl.sum(tl.where(m_e[:, None], v, 0.0), 0)
    tl.store(d_features + (group * n + i) * D + k, cast_rn(acc, d_features.dtype.element_ty), m_k)
