"""`batch_hard_triplet` in tiles of anchors against all candidates: the N x M matrix is never stored.

A tile's distances come from a matrix product and only select the two partners; the two distances in the loss are
computed from the difference of the vectors (of unit length for "cosine"), so that near points keep their digits. On a
GPU a small batch is mined by differences alone, which takes fewer launches.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast.arguments import (
    BatchHardArguments,
    BatchHardGradients,
    BatchHardNeed,
    BatchHardOutputs,
    BatchHardSaved,
    BatchHardUpstream,
    flatten,
)

# Memory of a tile of distances, at least one row of the matrix.
TILE_BYTES = 8 * 2**20
# Up to this many pairs, differences of all of them take a GPU less time than the launches of mining by products: an
# estimate.
FEW_PAIRS = 2**14

# Lower bound of distances; at it, up to rounding, their gradient is 0, so that coincident points have none.
FLOOR = 1e-6
AT_FLOOR = FLOOR * (1 + 1e-6)
# Lower bound of the norms by which F.normalize divides.
SHORTEST = 1e-12

INF = float("inf")


def forward(args: BatchHardArguments) -> BatchHardOutputs:
    """Find each anchor's hardest positive and negative, and its loss."""
    dtype = torch.promote_types(args.features.dtype, torch.float32)
    anchors = args.features.to(dtype)
    candidates = anchors if args.gallery is None else args.gallery.to(dtype)
    mine = _mine_cosine if args.metric == "cosine" else _mine_euclidean
    partners = mine(anchors, candidates, args.labels, args.candidate_labels)
    gap = partners.d_pos - partners.d_neg
    loss = F.softplus(gap) if args.soft else F.relu(args.margin + gap)
    return BatchHardOutputs(loss, *flatten(partners))


def backward(
    upstream: BatchHardUpstream, saved: BatchHardSaved, args: BatchHardArguments, need: BatchHardNeed
) -> BatchHardGradients:
    """Return the gradients, nonzero only for active anchors and their hardest positive and negative."""
    dtype = saved.d_pos.dtype
    a = args.features.to(dtype)
    group, index = _pairs(saved.positive, saved.negative)
    # Index -1 reads the last row, and zeros are added to it.
    b = _partners(args.candidates, group, index).to(dtype)
    distances = torch.stack((saved.d_pos, saved.d_neg), -1)  # (G, N, 2)
    weights = _weights(upstream, saved, args)
    differentiate = _cosine_gradients if args.metric == "cosine" else _euclidean_gradients
    own = args.gallery is None
    d_a, d_b = differentiate(a, b, distances, weights, need.features, need.features if own else need.gallery)
    d_gallery = None if own or d_b is None else d_b.new_zeros(args.candidates.shape)
    target = d_a if own else d_gallery
    if d_b is not None and target is not None:
        _add_rows(target, group, index, d_b.flatten(1, 2))
    return BatchHardGradients(*(d if d is None else d.to(args.features.dtype) for d in (d_a, d_gallery)))


def _weights(upstream: BatchHardUpstream, saved: BatchHardSaved, args: BatchHardArguments) -> Tensor:
    """Return the gradients (G, N, 2) of D_pos and of -D_neg, or (G, N, 1) where they are one."""
    d_loss, d_d_pos, d_d_neg = upstream.d_loss, upstream.d_d_pos, upstream.d_d_neg
    if d_loss is None:
        d_gap = torch.zeros_like(saved.d_pos)
    else:
        gap = saved.d_pos - saved.d_neg
        hinge = torch.ops.aten.threshold_backward
        d_gap = d_loss * torch.sigmoid(gap) if args.soft else hinge(d_loss, gap, -args.margin)
    if d_d_pos is None and d_d_neg is None:
        return d_gap[..., None]
    to_positive = d_gap if d_d_pos is None else d_gap + d_d_pos
    to_negative = d_gap if d_d_neg is None else d_gap - d_d_neg
    return torch.stack((to_positive, to_negative), -1)


def _between(weights: Tensor, distances: Tensor, low: float) -> Tensor:
    """Return weights (G, N, 2), 0 where a distance is at most `low` or infinite: there is no such partner."""
    masked: Tensor = torch.ops.aten.hardtanh_backward(weights.expand_as(distances), distances, low, INF)
    return masked


def _euclidean_gradients(
    a: Tensor, b: Tensor, distances: Tensor, weights: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of anchors a (G, N, D) and, in its memory, of their partners b (G, N, 2, D)."""
    weights = _between(weights, distances, AT_FLOOR).div_(distances)
    d_pos, d_neg = b.sub_(a[:, :, None]).mul_(weights[..., None]).unbind(2)
    d_a = d_neg - d_pos if need_a else None
    d_neg.neg_()
    return d_a, b if need_b else None


def _cosine_gradients(
    a: Tensor, b: Tensor, distances: Tensor, weights: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of anchors a (G, N, D) and, in its memory, of their partners b (G, N, 2, D).

    D = 1 - ab / (|a| |b|) has the gradient (cos a / |a| - b / |b|) / |a| in a; a norm at its lower bound is constant,
    and then the first term is absent.
    """
    weights = _between(weights, distances, -INF)
    cosines = (1 - distances).clamp_(-1, 1)  # finite without a partner, too
    norm_a, norm_b = _norms(a)[:, :, None], _norms(b)  # (G, N, 1, 1), (G, N, 2, 1)
    a, b = a[:, :, None] / norm_a, b.div_(norm_b)

    def project(unit: Tensor, norm: Tensor, other: Tensor) -> Tensor:
        along: Tensor = torch.ops.aten.threshold_backward(cosines[..., None], norm.expand_as(norm_b), SHORTEST)
        return (along * unit).sub_(other).mul_(weights[..., None] / norm)

    d_a = None
    if need_a:
        d_pos, d_neg = project(a, norm_a, b).unbind(2)
        d_a = d_pos - d_neg
    if not need_b:
        return d_a, None
    d_b = project(b, norm_b, a)
    d_b[:, :, 1].neg_()
    return d_a, d_b


def _norms(f: Tensor) -> Tensor:
    """Return norms (..., 1) of rows (..., D), by which F.normalize divides."""
    norm: Tensor = torch.linalg.vector_norm(f, dim=-1, keepdim=True)
    return norm.clamp_(min=SHORTEST)


def by_differences(anchors: Tensor, candidates: Tensor) -> bool:
    """Return True if launches cost more than arithmetic: few pairs of (G, N, D) and (G, M, D) on a GPU."""
    groups, n, _ = anchors.shape
    return anchors.is_cuda and groups * n * candidates.shape[1] <= FEW_PAIRS


def _mine_euclidean(a: Tensor, b: Tensor, labels: Tensor, candidate_labels: Tensor) -> BatchHardSaved:
    """Find each anchor's farthest positive and nearest negative by Euclidean distance.

    By products the rank of b is |b|^2 - 2 ab: it orders as the distance does, up to a constant of the anchor.
    """
    if by_differences(a, b):
        marked_b = b.add(b, alpha=0)  # makes infinite features NaN, and so their distances
        marked_a = marked_b if a is b else a.add(a, alpha=0)
        ranks = _mine_all(_differences(marked_a, marked_b).clamp_(min=FLOOR), labels, candidate_labels)
        # NaN where the anchor's square overflows, as in mining by products.
        partners = replace(ranks, d_pos=ranks.d_pos.add(a.square().sum(-1), alpha=0))
    else:
        common = _common_part(b)
        near_b = (b - common).add_(b, alpha=0)
        near_a = near_b if a is b else (a - common).add_(a, alpha=0)
        offset = near_b.square().sum(-1)[:, None]  # (G, 1, M)
        ranks = _mine_tiles(near_a, near_b, labels, candidate_labels, offset, -2)
        others = _partners(b, *_pairs(ranks.positive, ranks.negative))
        partners = _with_distances((a[:, :, None] - others).square().sum(-1).sqrt_().clamp_(min=FLOOR), ranks)
    has_positives = a is b and labels is candidate_labels  # itself
    return partners if has_positives else _mark_no_positive(partners, ranks)


def _mine_cosine(a: Tensor, b: Tensor, labels: Tensor, candidate_labels: Tensor) -> BatchHardSaved:
    """Find each anchor's farthest positive and nearest negative by cosine distance, 1 - cos.

    Between unit vectors it is |a - b|^2 / 2, which keeps the digits of a small one.
    """
    unit_b, shortfall_b = _normalize(b)
    unit_a, shortfall_a = (unit_b, shortfall_b) if a is b else _normalize(a)
    if by_differences(a, b):
        tile = _differences(unit_a, unit_b).square_().add_(shortfall_a).add_(shortfall_b.mT).mul_(0.5)
        partners = ranks = _mine_all(tile, labels, candidate_labels)
    else:
        ranks = _mine_tiles(unit_a, unit_b, labels, candidate_labels, a.new_zeros(()), -1)
        pairs = _pairs(ranks.positive, ranks.negative)
        distances = (unit_a[:, :, None] - _partners(unit_b, *pairs)).square_().sum(-1, keepdim=True)
        distances.add_(shortfall_a[:, :, None]).add_(_partners(shortfall_b, *pairs)).mul_(0.5)
        partners = _with_distances(distances[..., 0], ranks)
    has_positives = a is b and labels is candidate_labels  # itself
    return partners if has_positives else _mark_no_positive(partners, ranks)


def _mark_no_positive(partners: BatchHardSaved, ranks: BatchHardSaved) -> BatchHardSaved:
    """Set distance and index of the positive where a gallery has none, by the ranks."""
    no_positive = ranks.d_pos == -INF
    partners.d_pos.masked_fill_(no_positive, -INF)
    partners.positive.masked_fill_(no_positive, -1)
    return partners


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances of all pairs, (G, N, M), without a matrix product."""
    distances: Tensor = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distances


def _mine_all(tile: Tensor, labels: Tensor, candidate_labels: Tensor) -> BatchHardSaved:
    """Select partners by distances of all pairs (G, N, M), which are overwritten."""
    same = labels[:, None] == candidate_labels
    d_pos, positive = torch.where(same, tile, -INF).max(-1)
    # A distance that overflows still ranks before the masked ones.
    d_neg, negative = tile.clamp_(max=torch.finfo(tile.dtype).max).masked_fill_(same, INF).min(-1)
    return BatchHardSaved(d_pos, d_neg, positive, negative.masked_fill_(d_neg == INF, -1))


def _normalize(f: Tensor) -> tuple[Tensor, Tensor]:
    """Return F.normalize(f), and 1 minus the squared norms (..., 1) of its rows: exactly 0 but for degenerate ones.

    Those are shorter than SHORTEST, or their norm overflows, by which they become 0.
    """
    norm = torch.linalg.vector_norm(f, dim=-1, keepdim=True)
    divisor = norm.clamp(min=SHORTEST)
    return f / divisor, 1 - norm.div_(divisor).nan_to_num_(nan=0).square_()


def _mine_tiles(
    a: Tensor, b: Tensor, labels: Tensor, candidate_labels: Tensor, offset: Tensor, factor: int
) -> BatchHardSaved:
    """Return the largest `offset + factor ab` of each anchor's positives and the smallest of its negatives.

    In place of distances; -inf without a positive, inf without a negative.
    """
    groups, n, _ = a.shape
    m = b.shape[1]
    largest = torch.finfo(a.dtype).max
    farthest, nearest = (a.new_empty(groups, n) for _ in range(2))
    positive, negative = (labels.new_empty((groups, n), dtype=torch.int64) for _ in range(2))
    rows = max(1, TILE_BYTES // (groups * m * a.element_size()))
    for start in range(0, n, rows):
        anchors = slice(start, start + rows)
        tile = torch.baddbmm(offset, a[:, anchors], b.mT, alpha=factor)
        # A rank that overflows still orders before the masked ones.
        tile.clamp_(-largest, largest)
        same = labels[anchors, None] == candidate_labels
        torch.max(torch.where(same, tile, -INF), -1, out=(farthest[:, anchors], positive[:, anchors]))
        torch.min(tile.masked_fill_(same, INF), -1, out=(nearest[:, anchors], negative[:, anchors]))
    return BatchHardSaved(farthest, nearest, positive, negative)


def _with_distances(distances: Tensor, ranks: BatchHardSaved) -> BatchHardSaved:
    """Replace ranks by distances (G, N, 2)."""
    # Propagate a NaN rank, which the difference of the two vectors alone may not have.
    d_pos, d_neg = distances[..., 0].add(ranks.d_pos, alpha=0), distances[..., 1].add(ranks.d_neg, alpha=0)
    no_negative = ranks.d_neg == INF
    d_neg.masked_fill_(no_negative, INF)
    return BatchHardSaved(d_pos, d_neg, ranks.positive, ranks.negative.masked_fill_(no_negative, -1))


def _common_part(f: Tensor) -> Tensor:
    """Return a vector (G, 1, D) that most of a group's features share, or 0.

    Subtracting it keeps the digits of |b|^2 - 2 ab. It is the median of three medians of three features, if its norm is
    4 times that of their range.
    """
    n = f.shape[1]
    nine = torch.stack([f[:, i * n // 9] for i in range(9)])
    three = nine.view(3, 3, *nine.shape[1:]).sort(0).values[1].sort(0).values  # (3, G, D)
    three[2].sub_(three[0])
    size, spread = torch.linalg.vector_norm(three[1:], dim=-1, keepdim=True)
    return torch.where(size > 4 * spread, three[1], 0)[:, None]


def _pairs(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Index the partners' rows of (G, M, D): group (G, 1), and positive and negative alternating (G, 2N)."""
    group = torch.arange(len(positive), device=positive.device)[:, None]
    return group, torch.stack((positive, negative), -1).flatten(1)


def _partners(f: Tensor, group: Tensor, index: Tensor) -> Tensor:
    """Gather each anchor's two rows of f (G, M, D), (G, N, 2, D), by their `_pairs`."""
    return f[group, index].view(len(group), -1, 2, f.shape[-1])


def _add_rows(target: Tensor, group: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows[g, m] to target[group[g], index[g, m]], in a deterministic order."""
    m, width = target.shape[1:]
    if target.is_cuda:  # index_add_ is atomic there; index_put_ sorts
        target.index_put_((group, index), rows, accumulate=True)
    else:
        target.view(-1, width).index_add_(0, (index % m + m * group).flatten(), rows.flatten(0, 1))
