"""`batch_hard_triplet` tile by tile: a block of anchors against everybody at a time, never the N x N matrix.

A tile's distances come from a matrix product and only choose the two partners; the two distances that enter the loss
are then taken from the difference of the vectors themselves, so that near points do not lose their digits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances in flight: a row of the matrix at least.
TILE_BYTES = 8 * 2**20

# Distances are sqrt(max(d2, FLOOR)); at the floor, up to rounding, their gradient is 0: coincident points do not pull.
FLOOR = 1e-12
CLOSEST = FLOOR**0.5 * (1 + 1e-6)


def forward(features: Tensor, labels: Tensor, margin: float, soft: bool, metric: str) -> tuple[Tensor, ...]:
    """features (G, N, D), labels (N,) to loss, d_pos, d_neg (G, N) and int64 positive, negative (G, N).

    For "cosine" the features are unit vectors already. Without a negative: index -1, distance inf, loss 0.
    """
    f = features.to(torch.promote_types(features.dtype, torch.float32))
    farthest, positive, nearest, negative = _mine(f, labels, metric)
    # NaN where the rank is, which the difference alone need not show.
    d_pos = _distance(f, positive, metric).masked_fill(farthest.isnan(), float("nan"))
    d_neg = _distance(f, negative.clamp(min=0), metric).masked_fill(nearest.isnan(), float("nan"))
    d_neg = d_neg.masked_fill(negative < 0, float("inf"))
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
    """Gradient of the features (G, N, D): an active anchor moves itself and its two partners, nobody else."""
    f = features.to(d_pos.dtype)
    gap = d_pos - d_neg
    weight = d_loss * (torch.sigmoid(gap) if soft else (margin + gap > 0).to(gap.dtype))  # (G, N)
    d_f = torch.zeros_like(f, memory_format=torch.contiguous_format)
    for partner, distance, sign in ((positive, d_pos, 1.0), (negative, d_neg, -1.0)):
        # Without a negative the distance is inf and the weight 0; index 0 then receives zeros.
        other = _rows(f, partner.clamp(min=0))
        pull = sign * weight
        if metric == "cosine":
            d_f.sub_(other * pull[..., None])
            to_partner = f * -pull[..., None]
        else:
            pull = pull * (distance > CLOSEST) / distance
            to_partner = (other - f) * pull[..., None]
            d_f.sub_(to_partner)
        _add_rows(d_f, partner.clamp(min=0), to_partner)
    return d_f.to(features.dtype)


def _mine(f: Tensor, labels: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank and index of each anchor's farthest positive and nearest negative, (G, N); -1 without a negative."""
    groups, n, _ = f.shape
    if metric == "euclidean":
        f = (f - _common_part(f)).add_(f, alpha=0)  # an infinite feature is NaN, and its distances
    rows = max(1, TILE_BYTES // (groups * n * f.element_size()))
    largest = torch.finfo(f.dtype).max
    square = f.square().sum(-1)[:, None] if metric == "euclidean" else None  # (G, 1, N)
    mined = []
    for anchors, anchor_labels in zip(torch.split(f, rows, 1), torch.split(labels, rows), strict=True):
        # Up to a constant of the anchor: |b|^2 - 2 ab, or -ab.
        tile = torch.bmm(anchors, f.mT)
        tile = tile.neg_() if square is None else tile.mul_(-2).add_(square)
        # A rank that overflows still comes before those that are masked.
        tile.clamp_(-largest, largest)
        same = anchor_labels[:, None] == labels
        farthest = tile.masked_fill(~same, float("-inf")).max(-1)
        nearest = tile.masked_fill_(same, float("inf")).min(-1)
        mined.append((*farthest, nearest.values, nearest.indices.masked_fill_(same.all(-1), -1)))
    farthest_rank, positive, nearest_rank, negative = (torch.cat(blocks, 1) for blocks in zip(*mined, strict=True))
    return farthest_rank, positive, nearest_rank, negative


def _common_part(f: Tensor) -> Tensor:
    """A vector (G, 1, D) that most of a group's features share, or 0: without it |b|^2 - 2 ab loses no digits.

    It is the median of three medians of three features, where its square is 16 times that of their range.
    """
    n = f.shape[1]
    nine = torch.stack([f[:, i * n // 9] for i in range(9)])
    low, middle, high = nine.view(3, 3, *nine.shape[1:]).sort(0).values[1].sort(0).values
    shared = 16 * (high - low).square().sum(1, keepdim=True) < middle.square().sum(1, keepdim=True)
    return torch.where(shared, middle, 0)[:, None]


def _rows(f: Tensor, index: Tensor) -> Tensor:
    """f[g, index[g, n]], (G, N, D)."""
    return f.gather(1, index[..., None].expand(-1, -1, f.shape[2]))


def _distance(f: Tensor, partner: Tensor, metric: str) -> Tensor:
    """D(anchor, partner), (G, N)."""
    other = _rows(f, partner)
    if metric == "cosine":
        return 1 - (f * other).sum(-1)
    return (f - other).square().sum(-1).clamp(min=FLOOR).sqrt()


def _add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[g, index[g, n]] += rows[g, n], in the same order every time."""
    groups, n, width = target.shape
    flat = (index + n * torch.arange(groups, device=index.device)[:, None]).flatten()
    if target.is_cuda:  # index_add_ is atomic there; index_put_ sorts
        target.view(-1, width).index_put_((flat,), rows.reshape(-1, width), accumulate=True)
    else:
        target.view(-1, width).index_add_(0, flat, rows.reshape(-1, width))
