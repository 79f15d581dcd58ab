"""`batch_hard_triplet` in tiles of anchors against all features: the N x N matrix is never stored.

A tile's distances come from a matrix product and only select the two partners; the two distances in the loss are
computed from the difference of the vectors, so that near points keep their digits. On a GPU a small batch is mined by
differences alone, which takes fewer launches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast.arguments import BatchHardArguments, BatchHardOutputs, BatchHardSaved, flatten

# Memory of a tile of distances, at least one row of the matrix.
TILE_BYTES = 8 * 2**20
# Up to this many pairs, differences of all of them take a GPU less time than the launches of mining by products: an
# estimate.
FEW_PAIRS = 2**14

# Lower bound of distances; at it, up to rounding, their gradient is 0, so that coincident points have none.
FLOOR = 1e-6
AT_FLOOR = FLOOR * (1 + 1e-6)

INF = float("inf")


def forward(args: BatchHardArguments) -> BatchHardOutputs:
    """Find each anchor's hardest positive and negative, and its loss."""
    f = args.features.to(torch.promote_types(args.features.dtype, torch.float32))
    if args.metric == "euclidean" and by_differences(f):
        partners = _mine_by_differences(f, args.labels)
    else:
        partners = _mine_by_products(f, args.labels, args.metric)
    gap = partners.d_pos - partners.d_neg
    loss = F.softplus(gap) if args.soft else F.relu(args.margin + gap)
    return BatchHardOutputs(loss, *flatten(partners))


def backward(d_loss: Tensor, saved: BatchHardSaved, args: BatchHardArguments) -> Tensor:
    """Return the gradient of the features, nonzero only for active anchors and their hardest positive and negative."""
    d_pos, d_neg = saved.d_pos, saved.d_neg
    f, group, index, others = _partners(saved, args)
    gap = d_pos - d_neg
    hinge = torch.ops.aten.threshold_backward
    weight = d_loss * torch.sigmoid(gap) if args.soft else hinge(d_loss, gap, -args.margin)
    to_positive, to_negative = others.unbind(2)
    if args.metric == "cosine":
        d_f = (to_negative - to_positive).mul_(weight[..., None])
        torch.mul(f, weight[..., None], out=to_negative)
        torch.neg(to_negative, out=to_positive)
    else:
        to_positive.sub_(f)
        torch.sub(f, to_negative, out=to_negative)
        distances = torch.stack((d_pos, d_neg), -1)
        others.mul_((weight[..., None] / F.threshold(distances, AT_FLOOR, INF))[..., None])
        d_f = torch.add(to_positive, to_negative).neg_()
    _add_rows(d_f, group, index, others.flatten(1, 2))
    return d_f.to(args.features.dtype)


def distances_backward(
    d_d_pos: Tensor | None, d_d_neg: Tensor | None, saved: BatchHardSaved, args: BatchHardArguments
) -> Tensor:
    """Return the gradient of the features from those of the two distances, (G, N) each, None for zero."""
    f, group, index, others = _partners(saved, args)
    zero = torch.zeros_like(saved.d_pos)
    to_positive = zero if d_d_pos is None else d_d_pos
    to_negative = zero if d_d_neg is None else d_d_neg.masked_fill(saved.negative < 0, 0)
    weights = torch.stack((to_positive, to_negative), -1)[..., None]  # (G, N, 2, 1)
    if args.metric == "cosine":
        d_f = others.mul_(weights).sum(2).neg_()
        torch.mul(f[:, :, None], -weights, out=others)
    else:
        distances = torch.stack((saved.d_pos, saved.d_neg), -1)[..., None]
        others.sub_(f[:, :, None]).mul_(weights / F.threshold(distances, AT_FLOOR, INF))
        d_f = others.sum(2).neg_()
    _add_rows(d_f, group, index, others.flatten(1, 2))
    return d_f.to(args.features.dtype)


def _partners(saved: BatchHardSaved, args: BatchHardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the features in the arithmetic dtype, `_pairs`, and each anchor's two partners, (G, N, 2, D)."""
    f = args.features.to(saved.d_pos.dtype)
    group, index = _pairs(saved.positive, saved.negative)
    # Index -1 reads the last row, and zeros are added to it.
    return f, group, index, f[group, index].view(*f.shape[:2], 2, -1)


def by_differences(f: Tensor) -> bool:
    """Return True if launches cost more than arithmetic: few pairs of features (G, N, D) on a GPU."""
    groups, n, _ = f.shape
    return f.is_cuda and groups * n * n <= FEW_PAIRS


def _mine_by_differences(f: Tensor, labels: Tensor) -> BatchHardSaved:
    """Find each anchor's farthest positive and nearest negative by Euclidean distances of all pairs."""
    marked = f.add(f, alpha=0)  # makes infinite features NaN, and so their distances
    tile = torch.cdist(marked, marked, compute_mode="donot_use_mm_for_euclid_dist").clamp_(min=FLOOR)
    same = labels[:, None] == labels
    d_pos, positive = torch.where(same, tile, 0).max(-1)
    # A distance that overflows still ranks before the masked ones.
    d_neg, negative = tile.clamp_(max=torch.finfo(f.dtype).max).masked_fill_(same, INF).min(-1)
    # NaN where the anchor's square overflows, as in mining by products.
    d_pos.add_(f.square().sum(-1), alpha=0)
    return BatchHardSaved(d_pos, d_neg, positive, negative.masked_fill_(d_neg == INF, -1))


def _mine_by_products(f: Tensor, labels: Tensor, metric: str) -> BatchHardSaved:
    """Find each anchor's farthest positive and nearest negative by matrix products."""
    farthest, positive, nearest, negative = _rank(f, labels, metric)
    group, index = _pairs(positive, negative)
    distances = _distances(f, f[group, index].view(*f.shape[:2], 2, -1), metric)
    # Propagate a NaN rank, which the difference of the two vectors alone may not have.
    d_pos, d_neg = distances[..., 0].add(farthest, alpha=0), distances[..., 1].add(nearest, alpha=0)
    no_negative = nearest == INF
    d_neg.masked_fill_(no_negative, INF)
    return BatchHardSaved(d_pos, d_neg, positive, negative.masked_fill_(no_negative, -1))


def _rank(f: Tensor, labels: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rank and index of each anchor's farthest positive and nearest negative, (G, N); inf without a negative.

    The rank of b is |b|^2 - 2 ab, or -ab: it orders as the distance does, up to a constant of the anchor.
    """
    groups, n, _ = f.shape
    if metric == "euclidean":
        f = (f - _common_part(f)).add_(f, alpha=0)  # makes infinite features NaN, and so their distances
        offset, factor = f.square().sum(-1)[:, None], -2  # (G, 1, N)
    else:
        offset, factor = f.new_zeros(()), -1
    largest = torch.finfo(f.dtype).max
    farthest, nearest = (f.new_empty(groups, n) for _ in range(2))
    positive, negative = (labels.new_empty((groups, n), dtype=torch.int64) for _ in range(2))
    rows = max(1, TILE_BYTES // (groups * n * f.element_size()))
    for start in range(0, n, rows):
        anchors = slice(start, start + rows)
        tile = torch.baddbmm(offset, f[:, anchors], f.mT, alpha=factor)
        # A rank that overflows still orders before the masked ones.
        tile.clamp_(-largest, largest)
        same = labels[anchors, None] == labels
        torch.max(torch.where(same, tile, -INF), -1, out=(farthest[:, anchors], positive[:, anchors]))
        torch.min(tile.masked_fill_(same, INF), -1, out=(nearest[:, anchors], negative[:, anchors]))
    return farthest, positive, nearest, negative


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
    """Index the partners' rows of (G, N, D): group (G, 1), and positive and negative alternating (G, 2N)."""
    group = torch.arange(len(positive), device=positive.device)[:, None]
    return group, torch.stack((positive, negative), -1).flatten(1)


def _distances(f: Tensor, others: Tensor, metric: str) -> Tensor:
    """Return distances (G, N, 2) of each anchor to its two partners (G, N, 2, D)."""
    if metric == "cosine":
        return 1 - (f[:, :, None] * others).sum(-1)
    return (f[:, :, None] - others).square().sum(-1).sqrt_().clamp_(min=FLOOR)


def _add_rows(target: Tensor, group: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows[g, m] to target[group[g], index[g, m]], in a deterministic order."""
    n, width = target.shape[1:]
    if target.is_cuda:  # index_add_ is atomic there; index_put_ sorts
        target.index_put_((group, index), rows, accumulate=True)
    else:
        target.view(-1, width).index_add_(0, (index % n + n * group).flatten(), rows.flatten(0, 1))
