"""Batch-hard triplet losses that repositories have as plain objects, stated in our own words.

Arguments, attributes, defaults, return values, mining and distances are theirs; so are the classes' uses, but not their
names, which are mostly TripletLoss. Other kinds of mining that some of them have raise NotImplementedError here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.implementations.loss_parts import (
    by_reshape,
    by_sort,
    cosine,
    euclidean,
    gathered,
    make_ranking_loss,
    rank,
    same_label,
    unit,
)


class StrongBaselineTripletLoss:
    """Returns the loss and both distances; margin None is soft; a call may normalize the features."""

    def __init__(self, margin: float | None = None) -> None:
        self.margin = margin
        self.ranking_loss = make_ranking_loss(margin)

    def __call__(
        self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = unit(global_feat, added=1e-12) if normalize_feature else global_feat
        d_pos, d_neg = by_reshape(euclidean(features, features), same_label(labels, labels))
        return rank(self.ranking_loss, d_pos, d_neg), d_pos, d_neg


class CFAANTripletLoss(StrongBaselineTripletLoss):
    """Strong baseline's with a margin that is negative, not None, if it is not given."""

    def __init__(self, margin: float | None = -0.1) -> None:
        super().__init__(margin)


class VideoAWGTripletLoss(StrongBaselineTripletLoss):
    """Strong baseline's that returns the loss alone."""

    def __call__(self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False) -> Any:
        return super().__call__(global_feat, labels, normalize_feature)[0]


class TransReIDTripletLoss:
    """Strong baseline's with hard_factor, which stretches distances to positives and shrinks those to negatives."""

    def __init__(self, margin: float | None = None, hard_factor: float = 0.0) -> None:
        self.margin = margin
        self.hard_factor = hard_factor
        self.ranking_loss = make_ranking_loss(margin)

    def distances(self, features: Tensor) -> Tensor:
        return euclidean(features, features)

    def __call__(
        self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = unit(global_feat, added=1e-12) if normalize_feature else global_feat
        d_pos, d_neg = by_reshape(self.distances(features), same_label(labels, labels))
        d_pos, d_neg = d_pos.mul_(1 + self.hard_factor), d_neg.mul_(1 - self.hard_factor)
        return rank(self.ranking_loss, d_pos, d_neg), d_pos, d_neg


class IVTCosTripletLoss(TransReIDTripletLoss):
    """TransReID's on half the cosine distance."""

    def distances(self, features: Tensor) -> Tensor:
        return cosine(features, features) / 2


class NFormerTripletLoss(StrongBaselineTripletLoss):
    """Strong baseline's, mined by masks and a large number."""

    def __call__(
        self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = unit(global_feat, added=1e-12) if normalize_feature else global_feat
        distances, same = euclidean(features, features), same_label(labels, labels)
        d_pos = (distances * same).max(1).values
        d_neg = (distances * ~same + same * 1e8).min(1).values
        return rank(self.ranking_loss, d_pos, d_neg), d_pos, d_neg


def _clamped_cosine(features: Tensor) -> Tensor:
    normalized = unit(features, floor=1e-12)
    return (1 - normalized @ normalized.t()).abs().clamp(min=1e-12)


def _product_in_float32(features: Tensor) -> Tensor:
    squares = features.square().sum(1)
    distances = squares[:, None] + squares
    return distances.addmm_(features.float(), features.float().t(), alpha=-2).clamp(min=1e-12).sqrt()


class CentroidsTripletLoss:
    """Has its distance function as attribute; a call may select anchors by a mask."""

    def __init__(self, margin: float | None = None, dist_func: str = "euclidean") -> None:
        self.margin = margin
        self.ranking_loss = make_ranking_loss(margin)
        self.dist_func = _clamped_cosine if dist_func == "cosine" else _product_in_float32

    def __call__(
        self,
        global_feat: Tensor,
        labels: Tensor,
        warmup_margin: bool = False,
        print_data: bool = False,
        normalize_feature: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = unit(global_feat, added=1e-12) if normalize_feature else global_feat
        d_pos, d_neg = by_reshape(self.dist_func(features), same_label(labels, labels))
        if mask is not None:
            d_pos, d_neg = d_pos[mask], d_neg[mask]
        return rank(self.ranking_loss, d_pos, d_neg), d_pos, d_neg


class FastReIDTripletLoss:
    """Made of a config; multiplies the loss by a scale; other ranks' features are candidates, without gradients."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        self._margin = cfg.MARGIN
        self._normalize_feature = cfg.NORM_FEAT
        self._scale = cfg.SCALE
        self._hard_mining = cfg.HARD_MINING

    def __call__(self, embedding: Tensor, targets: Tensor) -> Tensor:
        if not self._hard_mining:
            raise NotImplementedError("means weighted by distance")
        features = unit(embedding, added=1e-12) if self._normalize_feature else embedding
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        candidates, labels = (gathered(features.detach()), gathered(targets)) if ranks > 1 else (features, targets)
        d_pos, d_neg = by_reshape(euclidean(features, candidates), same_label(targets, labels))
        loss = rank(make_ranking_loss(self._margin if self._margin > 0 else None), d_pos, d_neg)
        if self._margin <= 0 and loss == float("inf"):
            loss = rank(make_ranking_loss(0.3), d_pos, d_neg)
        return loss.mul(self._scale)


class HOReIDTripletLoss:
    """Takes anchors, positives and negatives, each with labels; mines both kinds by two sorts."""

    def __init__(self, margin: float, metric: str) -> None:
        self.margin = margin
        self.margin_loss = nn.MarginRankingLoss(margin=margin)
        self.metric = metric

    def __call__(
        self, emb1: Tensor, emb2: Tensor, emb3: Tensor, label1: Tensor, label2: Tensor, label3: Tensor
    ) -> Tensor:
        distances = euclidean if self.metric == "euclidean" else cosine
        d_pos, _ = by_sort(distances(emb1, emb2), same_label(label1, label2).float())
        _, d_neg = by_sort(distances(emb1, emb3), same_label(label1, label3).float())
        return rank(self.margin_loss, d_pos, d_neg)


class LightReIDTripletLoss:
    """Is called by keywords; computes and sorts the distances twice; the margin may be "soft"; reduces or not."""

    def __init__(self, margin: float | str, metric: str, reduce: bool = True) -> None:
        reduction = "mean" if reduce else "none"
        self.margin_loss: nn.Module = (
            nn.SoftMarginLoss(reduction=reduction)
            if isinstance(margin, str)
            else nn.MarginRankingLoss(margin=margin, reduction=reduction)
        )
        self.metric = metric

    def distances(self, emb: Tensor) -> Tensor:
        if self.metric == "euclidean":
            return euclidean(emb, emb)
        normalized = F.normalize(emb)
        return -normalized @ F.normalize(emb).t()

    def __call__(self, emb: Tensor, label: Tensor) -> Tensor:
        d_pos, _ = by_sort(self.distances(emb), same_label(label, label).float())
        _, d_neg = by_sort(self.distances(emb), same_label(label, label).float())
        return rank(self.margin_loss, d_pos, d_neg)


class VehicleReIDTripletLoss(StrongBaselineTripletLoss):
    """Strong baseline's that casts features to float32, or under use_amp to float16."""

    def __init__(self, margin: float | None = None, use_amp: bool = False) -> None:
        super().__init__(margin)
        self.use_amp = use_amp

    def __call__(
        self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().__call__(global_feat.half() if self.use_amp else global_feat.float(), labels, normalize_feature)


class FIReTripletLoss:
    """Has a mining method, by default "batch_hard"; returns the loss alone."""

    def __init__(self, margin: float | None = None, mining_method: str = "batch_hard") -> None:
        self.margin = margin
        self.mining_method = mining_method
        self.ranking_loss = make_ranking_loss(margin)

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        if self.mining_method != "batch_hard":
            raise NotImplementedError(self.mining_method)
        return rank(self.ranking_loss, *by_reshape(euclidean(features, features), same_label(labels, labels)))
