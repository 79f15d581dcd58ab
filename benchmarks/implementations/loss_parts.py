"""Distances and mining that batch-hard triplet losses share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

LARGE = 9999999.0
Mined = tuple[Tensor, Tensor]  # distances (N,) to the hardest positive and to the hardest negative


def euclidean(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Return distances (N, M) of features (N, D) and (M, D) by a matrix product, their squares at least 1e-12."""
    squares = anchors.square().sum(1)[:, None] + candidates.square().sum(1)
    return squares.addmm_(anchors, candidates.t(), alpha=-2).clamp(min=1e-12).sqrt()


def cosine(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Return 1 - cos (N, M) of features (N, D) and (M, D), the product divided by a matrix of norms."""
    norms = anchors.square().sum(1).sqrt()[:, None] * candidates.square().sum(1).sqrt()
    return 1 - anchors @ candidates.t() / norms


def negative_cosine(features: Tensor) -> Tensor:
    """Return -cos (N, N) of features (N, D), divided by their norms before the product."""
    normalized = unit(features)
    return -(normalized @ normalized.t())


def unit(features: Tensor, added: float = 0.0, floor: float = 0.0) -> Tensor:
    """Return features (N, D) over their norms, to which `added` is added or which are at least `floor`."""
    norms: Tensor = features.norm(dim=1, keepdim=True)  # type: ignore[no-untyped-call]
    if floor > 0:
        norms = norms.clamp(min=floor)
    return features / (norms + added if added > 0 else norms)


def same_label(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Return True (N, M) where labels (N,) and (M,) are equal."""
    return anchors.view(-1, 1) == candidates.view(1, -1)


def by_loop(distances: Tensor, same: Tensor) -> Mined:
    """Mine anchor by anchor; the backward of every distances[i] is a matrix as large as all distances."""
    anchors = range(len(distances))
    d_pos = torch.stack([distances[i][same[i]].max() for i in anchors])
    d_neg = torch.stack([distances[i][~same[i]].min() for i in anchors])
    return d_pos, d_neg


def by_reshape(distances: Tensor, same: Tensor) -> Mined:
    """Mine all anchors at once, where each has equally many positives."""
    n = len(distances)
    return distances[same].view(n, -1).max(1).values, distances[~same].view(n, -1).min(1).values


def by_large_number(distances: Tensor, same: Tensor) -> Mined:
    """Mine with a number added to what must not be found; `same` is a matrix of 0 and 1."""
    return (distances - 99999999.0 * (1 - same)).max(1).values, (distances + 99999999.0 * same).min(1).values


def by_sort(distances: Tensor, same: Tensor, nth: int = 0) -> Mined:
    """Mine by sorting all distances twice, a number added to what must come last; `same` as above.

    nth: how many positives are farther than the one that is found.
    """
    d_pos = (distances - LARGE * (1 - same)).sort(1, descending=True).values[:, nth]
    d_neg = (distances + LARGE * same).sort(1).values[:, 0]
    return d_pos, d_neg


def make_ranking_loss(margin: float | None) -> nn.Module:
    """Return PyTorch's hinge with a margin, or its soft margin for None."""
    return nn.SoftMarginLoss() if margin is None else nn.MarginRankingLoss(margin=margin)


def rank(loss: nn.Module, d_pos: Tensor, d_neg: Tensor) -> Tensor:
    """Return PyTorch's hinge or soft margin of two distances."""
    y = torch.ones_like(d_neg)
    value: Tensor = loss(d_neg - d_pos, y) if isinstance(loss, nn.SoftMarginLoss) else loss(d_neg, d_pos, y)
    return value


def precision(d_pos: Tensor, d_neg: Tensor) -> Tensor:
    """Return the ratio of anchors whose nearest negative is farther than their farthest positive, without gradient."""
    return (d_neg.data > d_pos.data).sum() * 1.0 / len(d_pos)


def gathered(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks, of which this rank's own have gradients; without a process group the tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor.detach())
    rows[dist.get_rank()] = tensor
    return torch.cat(rows)
