"""Kernels of `batch_hard_triplet`: the common vector and norms, mining and loss in one, and the gradient.

Rows of features and gallery are numbered in one sequence, the N features first; without a gallery the features are the
candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import cast_rn, dot

# Distances are sqrt(max(d2, FLOOR)). At the floor, up to rounding, their gradient is 0: coincident points have none.
FLOOR = tl.constexpr(1e-12)
AT_FLOOR = tl.constexpr(1e-6 * (1 + 1e-6))
# Limit of inverse norms: F.normalize divides by a norm of at least 1e-12. Vectors with a larger one are short.
MAX_INVERSE = tl.constexpr(1e12)
NO_INDEX = tl.constexpr(2**31 - 1)
SEARCH_WIDTH = tl.constexpr(128)


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
def _load_rows(p_group, row, column, index, k, m_row, D: tl.constexpr):
    """Load rows `index` and columns `k` of the group at p_group, in the dtype of the features."""
    o = index.to(tl.int64)[:, None] * row + k[None, :] * column
    return tl.load(p_group + o, m_row[:, None] & (k < D)[None, :], 0.0)


@triton.jit
def _load_both(features, gallery, group, i, k, n, rows, D: tl.constexpr):
    """Load rows i of features and gallery and columns k, in the dtype of the features."""
    p_features = features.ptr + group * features.group
    v = _load_rows(p_features, features.row, features.column, i, k, i < n, D)
    if gallery is not None:
        p_gallery = gallery.ptr + group * gallery.group
        w = _load_rows(p_gallery, gallery.row, gallery.column, i - n, k, (i >= n) & (i < rows), D)
        v = tl.where((i < n)[:, None], v, w)
    return v


@triton.jit
def _unit_scale(inverse):
    """Return the factor of vectors to unit vectors as by F.normalize, from their inverse norms."""
    return tl.where(inverse >= MAX_INVERSE, tl.full([1], MAX_INVERSE, inverse.dtype), inverse)


@triton.jit
def _unit_square(inverse):
    """Return the square norm of unit vectors: 1, but less if the vector is short, and 0 if its norm overflowed."""
    v = tl.full([1], MAX_INVERSE, inverse.dtype) / inverse
    return tl.where(inverse >= MAX_INVERSE, v * v, tl.where(inverse == 0.0, 0.0, 1.0))


@triton.jit
def _euclidean_distance(square):
    return tl.sqrt(tl.where(square < FLOOR, FLOOR, square))  # keeps a NaN


@triton.jit
def _cosine_distance(square, inverse_a, inverse_b):
    """Return 1 - cos from the square norm of the difference of unit vectors."""
    return 0.5 * square + (1.0 - 0.5 * (_unit_square(inverse_a) + _unit_square(inverse_b)))


@triton.jit
def _median(a, b, c):
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def _median_feature(p_group, row, column, i: tl.constexpr, n, k, D: tl.constexpr, ACC: tl.constexpr):
    """Return, in each of the columns k, the median of features i, i + 3 and i + 6 of nine evenly spaced ones."""
    p_column = p_group + k * column
    m_k = k < D
    n = tl.zeros([1], tl.int64) + n
    return _median(
        tl.load(p_column + i * n // 9 * row, m_k, 0.0).to(ACC),
        tl.load(p_column + (i + 3) * n // 9 * row, m_k, 0.0).to(ACC),
        tl.load(p_column + (i + 6) * n // 9 * row, m_k, 0.0).to(ACC),
    )


@triton.jit
def _median_and_range(p_group, row, column, n, k, D: tl.constexpr, ACC: tl.constexpr):
    """Return, in each of the columns k, median and range of three medians of three features each."""
    v0 = _median_feature(p_group, row, column, 0, n, k, D, ACC)
    v1 = _median_feature(p_group, row, column, 1, n, k, D, ACC)
    v2 = _median_feature(p_group, row, column, 2, n, k, D, ACC)
    return _median(v0, v1, v2), tl.maximum(tl.maximum(v0, v1), v2) - tl.minimum(tl.minimum(v0, v1), v2)


@triton.jit
def _common_squares(p_group, row, column, n, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Return the squares of `_median_and_range` of a group's candidates, of which there are n."""
    square_median = tl.zeros([BLOCK_D], ACC)
    square_range = tl.zeros([BLOCK_D], ACC)
    for d0 in range(0, D, BLOCK_D):
        b_median, b_range = _median_and_range(p_group, row, column, n, d0 + tl.arange(0, BLOCK_D), D, ACC)
        square_median += b_median * b_median
        square_range += b_range * b_range
    return tl.sum(square_median), tl.sum(square_range)


@triton.jit
def subtract_common_kernel(
    ranked,  # (G, ROWS, D), out, contiguous
    features,  # StridedFeatures (G, N, D)
    gallery,  # StridedFeatures (G, M, D), or None
    n,
    rows,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Subtract a vector that most of a group's candidates share; a program has BLOCK_N rows and BLOCK_K columns.

    Distances do not change, but |b|^2 - 2 ab no longer cancels. The vector is the median of three medians of three
    candidates, if its square is 16 times that of their range, else 0: outliers neither shift nor hide it.
    """
    group = tl.program_id(1).to(tl.int64)
    if gallery is None:
        candidates = features
        m = n
    else:
        candidates = gallery
        m = rows - n
    p_group = candidates.ptr + group * candidates.group
    square_median, square_range = _common_squares(p_group, candidates.row, candidates.column, m, D, BLOCK_D, ACC)
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_median, _ = _median_and_range(p_group, candidates.row, candidates.column, m, k, D, ACC)
    common = tl.where(16 * square_range < square_median, b_median, 0.0)
    v = _load_both(features, gallery, group, i, k, n, rows, D).to(ACC)
    v = v - common[None, :] + 0.0 * v  # makes infinite features NaN, and so their distances
    o = (group * rows + i[:, None]) * D + k[None, :]
    tl.store(ranked + o, cast_rn(v, ranked.dtype.element_ty), (i < rows)[:, None] & (k < D)[None, :])


@triton.jit
def inverse_norms_kernel(
    inverse_norms,  # (G, ROWS), out
    common,  # (G, D), out; or None
    features,  # StridedFeatures (G, N, D)
    gallery,  # StridedFeatures (G, M, D), or None
    n,
    rows,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the inverse Euclidean norms of features and gallery, and a unit vector near most candidates, or 0.

    A program has BLOCK_N rows, and one after them the vector. Norms are NaN for infinite features; their inverse is 0
    where the square overflows, as in F.normalize.
    """
    ACC: tl.constexpr = inverse_norms.dtype.element_ty
    group = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) * BLOCK_N < rows:
        i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        square = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for k0 in range(0, D, BLOCK_K):
            v = _load_both(features, gallery, group, i, k0 + tl.arange(0, BLOCK_K), n, rows, D).to(ACC)
            square += v * v + 0.0 * v
        tl.store(inverse_norms + group * rows + i, 1.0 / tl.sqrt(tl.sum(square, 1)), i < rows)
    elif common is not None:
        if gallery is None:
            candidates = features
            m = n
        else:
            candidates = gallery
            m = rows - n
        p_group = candidates.ptr + group * candidates.group
        square_median, square_range = _common_squares(p_group, candidates.row, candidates.column, m, D, BLOCK_K, ACC)
        dominates = (16 * square_range < square_median) & (square_median < float("inf"))
        for d0 in range(0, D, BLOCK_K):
            d = d0 + tl.arange(0, BLOCK_K)
            b_median, _ = _median_and_range(p_group, candidates.row, candidates.column, m, d, D, ACC)
            tl.store(common + group * D + d, tl.where(dominates, b_median / tl.sqrt(square_median), 0.0), d < D)


@triton.jit
def batch_hard_fwd_kernel(
    loss,  # (G, N), out, as the next four
    d_pos,
    d_neg,
    positive,  # int64
    negative,  # int64
    features,  # StridedFeatures (G, N, D), the anchors
    gallery,  # StridedFeatures (G, M, D), or None
    labels,  # StridedVector (N,)
    gallery_labels,  # StridedVector (M,), with the gallery
    ranked,  # (G, ROWS, D), the common vector subtracted, for mining alone; None for cosine
    inverse_norms,  # (G, ROWS), for cosine; or None
    common,  # (G, D), for cosine: subtracted from unit candidates for mining; or None
    n,
    m,
    margin: tl.float64,
    D: tl.constexpr,
    SOFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mine the two partners and compute the loss; a program has BLOCK_M anchors of a group, against all candidates."""
    ACC: tl.constexpr = loss.dtype.element_ty
    COSINE: tl.constexpr = inverse_norms is not None
    CENTERED: tl.constexpr = common is not None
    group = tl.program_id(1).to(tl.int64)
    if gallery is None:
        candidates = features
        candidate_labels = labels
        first = 0  # candidate's row
        rows = n
    else:
        candidates = gallery
        candidate_labels = gallery_labels
        first = n
        rows = n + m
    p_features = features.ptr + group * features.group
    p_candidates = candidates.ptr + group * candidates.group
    a = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_a = a < n
    b_label = tl.load(labels.ptr + a.to(tl.int64) * labels.element, m_a, 0)
    if COSINE:
        p_inverse = inverse_norms + group * rows
        a_inverse = tl.load(p_inverse + a, m_a, 1.0)
        a_scale = _unit_scale(a_inverse)
        a_sign = tl.where(a_inverse > 0.0, -1.0, a_scale)
    else:
        p_ranked = ranked + group * rows * D
        p_ranked_candidates = ranked + (group * rows + first) * D
    farthest = tl.full([BLOCK_M], float("-inf"), ACC)
    nearest = tl.full([BLOCK_M], float("-inf"), ACC)  # negated
    i_farthest = tl.full([BLOCK_M], NO_INDEX, tl.int32)
    i_nearest = tl.full([BLOCK_M], NO_INDEX, tl.int32)
    for b0 in range(0, m, BLOCK_N):
        b = b0 + tl.arange(0, BLOCK_N)
        m_b = b < m
        inner = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        square = tl.zeros([BLOCK_N], ACC)
        if COSINE:
            b_scale = _unit_scale(tl.load(p_inverse + first + b, m_b, 1.0))
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            if COSINE:
                v = _load_rows(p_features, features.row, features.column, a, k, m_a, D)
                w = _load_rows(p_candidates, candidates.row, candidates.column, b, k, m_b, D)
                if CENTERED:
                    w = w * b_scale[:, None] - tl.load(common + group * D + k, k < D, 0.0)[None, :]
            else:
                v = _load_rows(p_ranked, D, 1, a, k, m_a, D)
                w = _load_rows(p_ranked_candidates, D, 1, b, k, m_b, D)
            inner = dot(v, tl.trans(w), inner, PRECISION)
            if not COSINE:
                w = w.to(ACC)
                square += tl.sum(w * w, 1)
        # The distance's order, up to a constant and a factor of the anchor: |b|^2 - 2 ab, or -ab of a unit vector b.
        if COSINE:
            # Vectors whose norm overflows are 0 after F.normalize; those that are infinite are NaN.
            inner = tl.where(tl.abs(inner) < float("inf"), inner, 0.0) * a_sign[:, None]
            key = inner + 0.0 * b_scale[None, :] if CENTERED else inner * b_scale[None, :]
        else:
            key = square[None, :] - 2.0 * inner
        same = b_label[:, None] == tl.load(candidate_labels.ptr + b.to(tl.int64) * candidate_labels.element, m_b, 0)
        index = tl.broadcast_to(b[None, :], BLOCK_M, BLOCK_N)
        v, i = _farthest(key, index, same & m_b[None, :])
        farthest, i_farthest = _farther(farthest, i_farthest, v, i)
        v, i = _farthest(-key, index, (same == 0) & m_b[None, :])
        nearest, i_nearest = _farther(nearest, i_nearest, v, i)

    m_pos = i_farthest != NO_INDEX
    m_neg = i_nearest != NO_INDEX
    pos_square = tl.zeros([BLOCK_M], ACC)
    neg_square = tl.zeros([BLOCK_M], ACC)
    if COSINE:
        pos_inverse = tl.load(p_inverse + first + i_farthest, m_pos, 1.0)
        neg_inverse = tl.load(p_inverse + first + i_nearest, m_neg, 1.0)
        pos_scale = _unit_scale(pos_inverse)
        neg_scale = _unit_scale(neg_inverse)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = _load_rows(p_features, features.row, features.column, a, k, m_a, D).to(ACC)
        w = _load_rows(p_candidates, candidates.row, candidates.column, i_farthest, k, m_pos, D).to(ACC)
        u = _load_rows(p_candidates, candidates.row, candidates.column, i_nearest, k, m_neg, D).to(ACC)
        if COSINE:
            v *= a_scale[:, None]
            w *= pos_scale[:, None]
            u *= neg_scale[:, None]
        pos_square += tl.sum((v - w) * (v - w), 1)
        neg_square += tl.sum((v - u) * (v - u), 1)
    if COSINE:
        b_pos = _cosine_distance(pos_square, a_inverse, pos_inverse)
        b_neg = _cosine_distance(neg_square, a_inverse, neg_inverse)
    else:
        b_pos = _euclidean_distance(pos_square)
        b_neg = _euclidean_distance(neg_square)
    # Propagate a NaN rank, which the difference of the two vectors alone may not have.
    b_pos = tl.where(m_pos, tl.where(farthest != farthest, farthest, b_pos), float("-inf"))
    b_neg = tl.where(m_neg, tl.where(nearest != nearest, nearest, b_neg), float("inf"))
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
    tl.store(positive + o, tl.where(m_pos, i_farthest, -1).to(tl.int64), m_a)
    tl.store(negative + o, tl.where(m_neg, i_nearest, -1).to(tl.int64), m_a)


@triton.jit
def _load_per_anchor(values, group, a, m_a):
    return tl.load(values.ptr + group * values.group + a * values.anchor, m_a, 0.0)


@triton.jit
def _pairs(upstream, saved, group, a, m_a, n, margin, SOFT: tl.constexpr):
    """Return anchors a's distances to positive and negative, and the gradients of these distances."""
    o = group * n + a
    b_pos = tl.load(saved.d_pos + o, m_a, 1.0)
    b_neg = tl.load(saved.d_neg + o, m_a, 1.0)
    to_pos = tl.zeros(a.shape, b_pos.dtype)
    to_neg = tl.zeros(a.shape, b_pos.dtype)
    if upstream.d_loss is not None:
        weight = _load_per_anchor(upstream.d_loss, group, a, m_a)
        gap = b_pos - b_neg
        if SOFT:
            weight *= tl.sigmoid(gap)
        else:
            weight = tl.where(tl.full([1], margin, b_pos.dtype) + gap <= 0, 0.0, weight)
        to_pos += weight
        to_neg -= weight
    if upstream.d_d_pos is not None:
        to_pos += _load_per_anchor(upstream.d_d_pos, group, a, m_a)
    if upstream.d_d_neg is not None:
        to_neg += _load_per_anchor(upstream.d_d_neg, group, a, m_a)
    return b_pos, b_neg, to_pos, to_neg


@triton.jit
def _distance_gradient(v, w, p_inverse, i_v, i_w, m_row, distance, weight, COSINE: tl.constexpr):
    """Return `weight` times the gradient of the distances of rows v to rows w, [R, K], in v; 0 outside of m_row.

    Args:
        p_inverse: inverse norms of the group, if COSINE.
        i_v, i_w: rows' numbers among them.
        distance, weight: [R].
    """
    if COSINE:
        v_inverse = tl.load(p_inverse + i_v)
        v_scale = _unit_scale(v_inverse)
        v = v * v_scale[:, None]
        w = w * _unit_scale(tl.load(p_inverse + i_w, m_row, 1.0))[:, None]
        # A short vector is scaled by a constant, so its gradient is -w, without the projection.
        along = tl.where(v_inverse >= MAX_INVERSE, 1.0, distance)
        d_v = ((v - w) - along[:, None] * v) * (weight * v_scale)[:, None]
    else:
        d_v = (v - w) * tl.where(distance <= AT_FLOOR, 0.0, weight / distance)[:, None]  # keeps a NaN
    return tl.where(m_row[:, None], d_v, 0.0)


@triton.jit
def _lower_bound(p_sorted, value, begin, end):
    """Return the index of the first value in p_sorted[begin:end] that is at least `value`."""
    size = end - begin
    while size > 0:
        step = (size + SEARCH_WIDTH - 1) // SEARCH_WIDTH
        o = tl.arange(0, SEARCH_WIDTH) * step
        m_o = o < size
        below = tl.sum((m_o & (tl.load(p_sorted + begin + o, m_o, value) < value)).to(tl.int64))
        end = tl.minimum(begin + below * step, begin + size)
        begin += tl.where(below > 0, (below - 1) * step + 1, 0)
        size = end - begin
    return begin


@triton.jit
def batch_hard_bwd_kernel(
    d_rows,  # (G, R, D), out; R = N, or M without AS_ANCHOR
    upstream,  # Upstream
    saved,  # Partners
    features,  # StridedFeatures (G, N, D), the anchors
    gallery,  # StridedFeatures (G, M, D), or None
    inverse_norms,  # (G, ROWS), for cosine; or None
    partners,  # (G, 2 N), sorted: each anchor's positive and negative; or None
    choices,  # (G, 2 N): anchors that selected these as positive, and N + those that did as negative; or None
    n,
    m,
    margin: tl.float64,
    D: tl.constexpr,
    SOFT: tl.constexpr,
    AS_ANCHOR: tl.constexpr,
    AS_PARTNER: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather a row's gradient, as anchor and as partner of others; a program has BLOCK_K of its columns.

    Without `choices`, all anchors are scanned for those that selected the row.
    """
    ACC: tl.constexpr = saved.d_pos.dtype.element_ty
    COSINE: tl.constexpr = inverse_norms is not None
    group = tl.program_id(1).to(tl.int64)
    if gallery is None:
        candidates = features
        first = 0  # candidate's row
        rows = n
    else:
        candidates = gallery
        first = n
        rows = n + m
    p_features = features.ptr + group * features.group
    p_candidates = candidates.ptr + group * candidates.group
    p_inverse = inverse_norms
    if COSINE:
        p_inverse += group * rows
    i = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    there = tl.full([1], True, tl.int1)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([1, BLOCK_K], ACC)
    if AS_ANCHOR:
        v = _load_rows(p_features, features.row, features.column, i, k, there, D).to(ACC)
        b_pos, b_neg, to_pos, to_neg = _pairs(upstream, saved, group, i, there, n, margin, SOFT)
        i_pos = tl.load(saved.positive + group * n + i)
        i_neg = tl.load(saved.negative + group * n + i)
        w = _load_rows(p_candidates, candidates.row, candidates.column, i_pos, k, i_pos >= 0, D).to(ACC)
        acc += _distance_gradient(v, w, p_inverse, i, first + i_pos, i_pos >= 0, b_pos, to_pos, COSINE)
        w = _load_rows(p_candidates, candidates.row, candidates.column, i_neg, k, i_neg >= 0, D).to(ACC)
        acc += _distance_gradient(v, w, p_inverse, i, first + i_neg, i_neg >= 0, b_neg, to_neg, COSINE)
    if AS_PARTNER:
        v = _load_rows(p_candidates, candidates.row, candidates.column, i, k, there, D).to(ACC)
        p_positive = saved.positive + group * n
        p_negative = saved.negative + group * n
        begin = tl.full([], 0, tl.int64)
        end = begin + 2 * n
        if choices is not None:
            p_partners = partners + group * (2 * n)
            begin = _lower_bound(p_partners, tl.program_id(0), begin, end)
            end = _lower_bound(p_partners, tl.program_id(0) + 1, begin, end)
        for e0 in range(begin, end, BLOCK_A):
            choice = e0 + tl.arange(0, BLOCK_A)
            m_e = choice < end
            if choices is None:
                partner = tl.load(p_positive + choice, choice < n, -1)
                partner = tl.where(choice < n, partner, tl.load(p_negative + choice - n, m_e & (choice >= n), -1))
                m_e = partner == i
            else:
                choice = tl.load(choices + group * (2 * n) + choice, m_e, 0)
            if tl.sum(m_e.to(tl.int32)) > 0:
                a = tl.where(choice < n, choice, choice - n)
                b_anchor = _load_rows(p_features, features.row, features.column, a, k, m_e, D).to(ACC)
                d_pos, d_neg, as_pos, as_neg = _pairs(upstream, saved, group, a, m_e, n, margin, SOFT)
                distance = tl.where(choice < n, d_pos, d_neg)
                weight = tl.where(choice < n, as_pos, as_neg)
                d_e = _distance_gradient(v, b_anchor, p_inverse, first + i, a, m_e, distance, weight, COSINE)
                acc += tl.sum(d_e, 0)[None, :]
    count = n if AS_ANCHOR else m
    o = (group * count + i[:, None]) * D + k[None, :]
    tl.store(d_rows + o, cast_rn(acc, d_rows.dtype.element_ty), (k < D)[None, :])
