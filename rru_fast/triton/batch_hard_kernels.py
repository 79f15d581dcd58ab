"""The kernels of `batch_hard_triplet`: mining and loss in one, and the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import narrowed, product

# Distances are sqrt(max(d2, FLOOR)); at the floor, up to rounding, their gradient is 0: coincident points do not pull.
FLOOR = tl.constexpr(1e-12)
CLOSEST = tl.constexpr(1e-6 * (1 + 1e-6))
NOBODY = tl.constexpr(2**31 - 1)


@triton.jit
def _farther(v, i, w, j):
    """The larger of two distances with its index: NaN above all, the lowest index of equals."""
    take = (w > v) | ((w != w) & (v == v)) | (((w == v) | ((w != w) & (v != v))) & (j < i))
    return tl.where(take, w, v), tl.where(take, j, i)


@triton.jit
def _farthest(key, index, candidate):
    """Of each row's candidates, by `_farther`'s order; without any -inf and NOBODY."""
    v = tl.max(tl.where(candidate & (key == key), key, float("-inf")), 1)
    i = tl.min(tl.where(candidate & (key == v[:, None]), index, NOBODY), 1)
    i_nan = tl.min(tl.where(candidate & (key != key), index, NOBODY), 1)
    return tl.where(i_nan == NOBODY, v, float("nan")), tl.where(i_nan == NOBODY, i, i_nan)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); log1p by its first-order correction."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def _load(features, index, k, row_stride, column_stride, here, D: tl.constexpr):
    """Rows `index` and columns `k` of a group's features, as they are stored."""
    at = index.to(tl.int64)[:, None] * row_stride + k[None, :] * column_stride
    return tl.load(features + at, here[:, None] & (k < D)[None, :], 0.0)


@triton.jit
def _distance(square, inner, COSINE: tl.constexpr):
    if COSINE:
        return 1.0 - inner
    else:
        return tl.sqrt(tl.where(square < FLOOR, FLOOR, square))  # a NaN stays one


@triton.jit
def _median(a, b, c):
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _median_feature(features, i: tl.constexpr, n, row_stride, k, column_stride, D: tl.constexpr, SUM: tl.constexpr):
    """In each of the columns k, the median of features i, i + 3 and i + 6 of nine that are evenly spaced."""
    column = features + k * column_stride
    m_k = k < D
    ninth = tl.zeros([1], tl.int64) + n
    return _median(
        tl.load(column + i * ninth // 9 * row_stride, m_k, 0.0).to(SUM),
        tl.load(column + (i + 3) * ninth // 9 * row_stride, m_k, 0.0).to(SUM),
        tl.load(column + (i + 6) * ninth // 9 * row_stride, m_k, 0.0).to(SUM),
    )


@triton.jit
def _median_and_range(features, n, row_stride, k, column_stride, D: tl.constexpr, SUM: tl.constexpr):
    """Of three medians of three features, in each of the columns k."""
    m0 = _median_feature(features, 0, n, row_stride, k, column_stride, D, SUM)
    m1 = _median_feature(features, 1, n, row_stride, k, column_stride, D, SUM)
    m2 = _median_feature(features, 2, n, row_stride, k, column_stride, D, SUM)
    return _median(m0, m1, m2), tl.maximum(tl.maximum(m0, m1), m2) - tl.minimum(tl.minimum(m0, m1), m2)


@triton.jit
def subtract_common_kernel(
    ranked,  # (G, N, D), out, contiguous
    features,  # (G, N, D)
    group_stride,
    row_stride,
    column_stride,
    n,
    D: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N features of a group, and BLOCK_K of their columns, a program: less a vector that most of the group share.

    Distances do not change, but |b|^2 - 2 ab no longer cancels. It is the median of three medians of three features,
    where its square is 16 times that of their range, else 0: outliers neither shift nor hide it.
    """
    group = tl.program_id(1).to(tl.int64)
    features += group * group_stride
    shared2 = tl.zeros([BLOCK_D], SUM)
    range2 = tl.zeros([BLOCK_D], SUM)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        middle, extent = _median_and_range(features, n, row_stride, d, column_stride, D, SUM)
        shared2 += middle * middle
        range2 += extent * extent
    b = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    middle, extent = _median_and_range(features, n, row_stride, k, column_stride, D, SUM)
    common = tl.where(16 * tl.sum(range2) < tl.sum(shared2), middle, 0.0)
    v = _load(features, b, k, row_stride, column_stride, b < n, D).to(SUM)
    v = v - common[None, :] + 0.0 * v  # an infinite one is NaN, and its distances
    at = ranked + (group * n + b[:, None]) * D + k[None, :]
    tl.store(at, narrowed(v, ranked.dtype.element_ty), (b < n)[:, None] & (k < D)[None, :])


@triton.jit
def batch_hard_kernel(
    loss,  # (G, N), out, as the next four
    d_pos,
    d_neg,
    positive,  # int64
    negative,
    features,  # (G, N, D)
    group_stride,
    row_stride,
    column_stride,
    ranked,  # (G, N, D), features less what most share, by which partners are chosen
    ranked_group,
    ranked_row,
    ranked_column,
    labels,  # (N,)
    label_stride,
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
    """BLOCK_M anchors of a group a program, against all."""
    SUM: tl.constexpr = loss.dtype.element_ty
    group = tl.program_id(1).to(tl.int64)
    features += group * group_stride
    ranked += group * ranked_group
    a = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    anchor = a < n
    label = tl.load(labels + a.to(tl.int64) * label_stride, anchor, 0)
    far = tl.full([BLOCK_M], float("-inf"), SUM)
    near = tl.full([BLOCK_M], float("-inf"), SUM)  # negated
    i_far = tl.full([BLOCK_M], NOBODY, tl.int32)
    i_near = tl.full([BLOCK_M], NOBODY, tl.int32)
    for b0 in range(0, n, BLOCK_N):
        b = b0 + tl.arange(0, BLOCK_N)
        other = b < n
        inner = tl.zeros([BLOCK_M, BLOCK_N], SUM)
        square = tl.zeros([BLOCK_N], SUM)
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            v = _load(ranked, a, k, ranked_row, ranked_column, anchor, D)
            w = _load(ranked, b, k, ranked_row, ranked_column, other, D)
            inner = product(v, tl.trans(w), inner, PRECISION)
            if not COSINE:
                w = w.to(SUM)
                square += tl.sum(w * w, 1)
        # Up to a constant of the anchor: |b|^2 - 2 ab, or -ab.
        key = -inner
        if not COSINE:
            key = square[None, :] + 2.0 * key
        same = label[:, None] == tl.load(labels + b.to(tl.int64) * label_stride, other, 0)[None, :]
        index = tl.broadcast_to(b[None, :], BLOCK_M, BLOCK_N)
        v, i = _farthest(key, index, same & other[None, :])
        far, i_far = _farther(far, i_far, v, i)
        v, i = _farthest(-key, index, (same == 0) & other[None, :])
        near, i_near = _farther(near, i_near, v, i)

    lonely = i_near == NOBODY
    i_near = tl.where(lonely, 0, i_near)
    i_far = tl.where(i_far == NOBODY, 0, i_far)  # beyond the last anchor
    pos_square = tl.zeros([BLOCK_M], SUM)
    neg_square = tl.zeros([BLOCK_M], SUM)
    pos_inner = tl.zeros([BLOCK_M], SUM)
    neg_inner = tl.zeros([BLOCK_M], SUM)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = _load(features, a, k, row_stride, column_stride, anchor, D).to(SUM)
        w = _load(features, i_far, k, row_stride, column_stride, anchor, D).to(SUM)
        pos_square += tl.sum((v - w) * (v - w), 1)
        pos_inner += tl.sum(v * w, 1)
        w = _load(features, i_near, k, row_stride, column_stride, anchor, D).to(SUM)
        neg_square += tl.sum((v - w) * (v - w), 1)
        neg_inner += tl.sum(v * w, 1)
    # NaN where the rank is, which the difference alone need not show.
    v_pos = tl.where(far != far, far, _distance(pos_square, pos_inner, COSINE))
    v_neg = tl.where(near != near, near, _distance(neg_square, neg_inner, COSINE))
    v_neg = tl.where(lonely, float("inf"), v_neg)
    gap = v_pos - v_neg
    if SOFT:
        v = _softplus(gap)
    else:
        v = tl.full([1], margin, SUM) + gap
        v = tl.where(v <= 0, 0.0, v)  # a NaN stays one
    at = group * n + a
    tl.store(loss + at, v, anchor)
    tl.store(d_pos + at, v_pos, anchor)
    tl.store(d_neg + at, v_neg, anchor)
    tl.store(positive + at, i_far.to(tl.int64), anchor)
    tl.store(negative + at, tl.where(lonely, -1, i_near).to(tl.int64), anchor)


@triton.jit
def _pulls(
    d_loss, d_loss_group, d_loss_row, d_pos, d_neg, group, a, here, n, margin, SOFT: tl.constexpr, COSINE: tl.constexpr
):
    """How hard the anchors a pull at their positive and, negated, at their negative."""
    v_pos = tl.load(d_pos + group * n + a, here, 1.0)
    v_neg = tl.load(d_neg + group * n + a, here, float("inf"))
    weight = tl.load(d_loss + group * d_loss_group + a * d_loss_row, here, 0.0).to(v_pos.dtype)
    gap = v_pos - v_neg
    if SOFT:
        weight *= tl.sigmoid(gap)
    else:
        weight = weight * (tl.full([1], margin, v_pos.dtype) + gap > 0).to(v_pos.dtype)
    if COSINE:
        return weight, -weight
    else:
        to_pos = weight * (v_pos > CLOSEST).to(v_pos.dtype) / v_pos
        return to_pos, -weight * (v_neg > CLOSEST).to(v_pos.dtype) / v_neg


@triton.jit
def batch_hard_backward_kernel(
    d_features,  # (G, N, D), out
    d_loss,  # (G, N)
    d_loss_group,
    d_loss_row,
    features,  # (G, N, D)
    group_stride,
    row_stride,
    column_stride,
    d_pos,  # (G, N), as the next three
    d_neg,
    positive,
    negative,
    choices,  # (G, 2 N): anchors that chose a positive, then N + those that chose a negative, sorted by whom
    begins,  # (G, N + 1): where in `choices` those lie that chose a feature
    n,
    margin: tl.float64,
    D: tl.constexpr,
    SUM: tl.constexpr,
    SOFT: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A feature, and BLOCK_K of its columns, a program."""
    i = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    features += group * group_stride
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    own = tl.load(features + i * row_stride + k * column_stride, k < D, 0.0).to(SUM)
    to_pos, to_neg = _pulls(d_loss, d_loss_group, d_loss_row, d_pos, d_neg, group, i, True, n, margin, SOFT, COSINE)
    pos = tl.load(positive + group * n + i)
    neg = tl.load(negative + group * n + i)
    v_pos = tl.load(features + pos * row_stride + k * column_stride, k < D, 0.0).to(SUM)
    v_neg = tl.load(features + neg * row_stride + k * column_stride, (k < D) & (neg >= 0), 0.0).to(SUM)
    acc = (own - v_pos) * to_pos + (own - v_neg) * to_neg
    if COSINE:
        acc = -(v_pos * to_pos) - v_neg * to_neg
    begin = tl.load(begins + group * (n + 1) + i)
    end = tl.load(begins + group * (n + 1) + i + 1)
    for e0 in range(begin, end, BLOCK_A):
        e = e0 + tl.arange(0, BLOCK_A)
        here = e < end
        choice = tl.load(choices + group * (2 * n) + e, here, 0)
        a = choice % n
        as_pos, as_neg = _pulls(d_loss, d_loss_group, d_loss_row, d_pos, d_neg, group, a, here, n, margin, SOFT, COSINE)
        pull = tl.where(here, tl.where(choice < n, as_pos, as_neg), 0.0)
        v = _load(features, a, k, row_stride, column_stride, here, D).to(SUM)
        toward = own[None, :] - v
        if COSINE:
            toward = -v
        v = toward * pull[:, None]
        acc += tl.sum(tl.where(here[:, None], v, 0.0), 0)
    tl.store(d_features + (group * n + i) * D + k, narrowed(acc, d_features.dtype.element_ty), k < D)
