"""`batch_hard_triplet` tile by tile: a block of anchors against all features at a time, never the whole N x N matrix.

A tile's distances come from a matrix product and only choose the two partners; the two distances in the loss are of the
vectors' difference, so that near points do not lose their digits. On a GPU a small batch is mined by differences alone:
fewer launches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances in flight: a row of the matrix at least.
TILE_BYTES = 8 * 2**20
# Pairs up to which differences of all take a GPU less time than the launches of mining by products; an estimate.
FEW_PAIRS = 2**14

# Distances are at least FLOOR; there, up to rounding, their gradient is 0: coincident points do not pull.
FLOOR = 1e-6
CLOSEST = FLOOR * (1 + 1e-6)

INF = float("inf")


def forward(features: Tensor, labels: Tensor, margin: float, soft: bool, metric: str) -> tuple[Tensor, ...]:
    """features (G, N, D), labels (N,) to loss, d_pos, d_neg (G, N) and int64 positive, negative (G, N).

    For "cosine" the features are unit vectors already. Without a negative: index -1, distance inf, loss 0.
    """
    f = features.to(torch.promote_types(features.dtype, torch.float32))
    if metric == "euclidean" and by_differences(f):
        d_pos, d_neg, positive, negative = _mine_by_differences(f, labels)
    else:
        d_pos, d_neg, positive, negative = _mine_by_products(f, labels, metric)
    gap = d_pos - d_neg
    loss = F.softplus(gap) if soft else F.relu(margin + gap)
    return loss, d_pos, d_neg, positive, negative


def backward(
    d_loss: Tensor,
    features: Tensor,
    d_pos: Tensor,
    d_neg: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    soft: bool,
    metric: str,
) -> Tensor:
    """Gradient of the features (G, N, D), nonzero only for active anchors and their hardest positive and negative."""
    f = features.to(d_pos.dtype)
    gap = d_pos - d_neg
    weight = d_loss * torch.sigmoid(gap) if soft else torch.ops.aten.threshold_backward(d_loss, gap, -margin)
    group, index = _pairs(positive, negative)
    others = f[group, index].view(*f.shape[:2], 2, -1)  # (G, N, 2, D); the last row for -1, which receives zeros
    to_positive, to_negative = others.unbind(2)
    if metric == "cosine":
        d_f = (to_negative - to_positive).mul_(weight[..., None])
        torch.mul(f, weight[..., None], out=to_negative)
        torch.neg(to_negative, out=to_positive)
    else:
        to_positive.sub_(f)
        torch.sub(f, to_negative, out=to_negative)
        distances = torch.stack((d_pos, d_neg), -1)
        others.mul_((weight[..., None] / F.threshold(distances, CLOSEST, INF))[..., None])
        d_f = torch.add(to_positive, to_negative).neg_()
    _add_rows(d_f, group, index, others.flatten(1, 2))
    return d_f.to(features.dtype)


def by_differences(f: Tensor) -> bool:
    """Return True if launches cost more than arithmetic: few pairs of features (G, N, D) on a GPU."""
    groups, n, _ = f.shape
    return f.is_cuda and groups * n * n <= FEW_PAIRS


def _mine_by_differences(f: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Euclidean distance and index of each anchor's farthest positive and nearest negative, (G, N)."""
    marked = f.add(f, alpha=0)  # an infinite feature is NaN, and its distances
    tile = torch.cdist(marked, marked, compute_mode="donot_use_mm_for_euclid_dist").clamp_(min=FLOOR)
    same = labels[:, None] == labels
    d_pos, positive = torch.where(same, tile, 0).max(-1)
    # A distance that overflows still comes before the masked ones.
    d_neg, negative = tile.clamp_(max=torch.finfo(f.dtype).max).masked_fill_(same, INF).min(-1)
    # NaN where the anchor's square overflows, as in mining by products.
    return d_pos.add_(f.square().sum(-1), alpha=0), d_neg, positive, negative.masked_fill_(d_neg == INF, -1)


def _mine_by_products(f: Tensor, labels: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distance and index of each anchor's farthest positive and nearest negative, (G, N)."""
    farthest, positive, nearest, negative = _rank(f, labels, metric)
    group, index = _pairs(positive, negative)
    distances = _distances(f, f[group, index].view(*f.shape[:2], 2, -1), metric)
    # NaN where the rank is, which the difference alone need not show.
    d_pos, d_neg = distances[..., 0].add(farthest, alpha=0), distances[..., 1].add(nearest, alpha=0)
    lonely = nearest == INF
    return d_pos, d_neg.masked_fill_(lonely, INF), positive, negative.masked_fill_(lonely, -1)


def _rank(f: Tensor, labels: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank and index of each anchor's farthest positive and nearest negative, (G, N); rank inf without a negative.

    The rank of b is |b|^2 - 2 ab, or -ab: the distance up to a constant of the anchor.
    """
    groups, n, _ = f.shape
    if metric == "euclidean":
        f = (f - _common_part(f)).add_(f, alpha=0)  # an infinite feature is NaN, and its distances
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
        # A rank that overflows still comes before the masked ones.
        tile.clamp_(-largest, largest)
        same = labels[anchors, None] == labels
        torch.max(torch.where(same, tile, -INF), -1, out=(farthest[:, anchors], positive[:, anchors]))
        torch.min(tile.masked_fill_(same, INF), -1, out=(nearest[:, anchors], negative[:, anchors]))
    return farthest, positive, nearest, negative


def _common_part(f: Tensor) -> Tensor:
    """A vector (G, 1, D) that most of a group's features share, or 0: without it |b|^2 - 2 ab loses no digits.

    It is the median of three medians of three features, where its norm is 4 times that of their range.
    """
    n = f.shape[1]
    nine = torch.stack([f[:, i * n // 9] for i in range(9)])
    three = nine.view(3, 3, *nine.shape[1:]).sort(0).values[1].sort(0).values  # (3, G, D)
    three[2].sub_(three[0])
    size, spread = torch.linalg.vector_norm(three[1:], dim=-1, keepdim=True)
    return torch.where(size > 4 * spread, three[1], 0)[:, None]


def _pairs(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the partners' rows in (G, N, D): group (G, 1), and positive and negative alternating (G, 2N)."""
    group = torch.arange(len(positive), device=positive.device)[:, None]
    return group, torch.stack((positive, negative), -1).flatten(1)


def _distances(f: Tensor, others: Tensor, metric: str) -> Tensor:
    """Distances (G, N, 2) of each anchor to its two partners (G, N, 2, D)."""
    if metric == "cosine":
        return 1 - (f[:, :, None] * others).sum(-1)
    return (f[:, :, None] - others).square().sum(-1).sqrt_().clamp_(min=FLOOR)


def _add_rows(target: Tensor, group: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[group[g], index[g, m]] += rows[g, m], in the same order every time."""
    n, width = target.shape[1:]
    if target.is_cuda:  # index_add_ is atomic there; index_put_ sorts
        target.index_put_((group, index), rows, accumulate=True)
    else:
        target.view(-1, width).index_add_(0, (index % n + n * group).flatten(), rows.flatten(0, 1))
