"""Batch-hard triplet losses that repositories have as modules, stated in our own words: see `loss_objects`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.implementations.loss_parts import (
    by_large_number,
    by_loop,
    by_reshape,
    euclidean,
    gathered,
    make_ranking_loss,
    negative_cosine,
    precision,
    rank,
    same_label,
)


class _TripletLoss(nn.Module):
    """The attributes that most of them have."""

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin
        self.ranking_loss: nn.Module = nn.MarginRankingLoss(margin=margin)


class TorchreidTripletLoss(_TripletLoss):
    """Loops over anchors and returns the loss."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return rank(self.ranking_loss, *by_loop(euclidean(inputs, inputs), same_label(targets, targets)))


class PersonReidLibTripletLoss(_TripletLoss):
    """Reshapes the distances of equally many positives and negatives; its margin is 0 if it is not given."""

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__(margin)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return rank(self.ranking_loss, *by_reshape(euclidean(inputs, inputs), same_label(targets, targets)))


class AP3DTripletLoss(_TripletLoss):
    """Has a distance, "euclidean" or "cosine", the negative cosine; loops over anchors."""

    def __init__(self, margin: float = 0.3, distance: str = "euclidean") -> None:
        super().__init__(margin)
        self.distance = distance

    def distances(self, inputs: Tensor) -> Tensor:
        return euclidean(inputs, inputs) if self.distance == "euclidean" else negative_cosine(inputs)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return rank(self.ranking_loss, *by_loop(self.distances(inputs), same_label(targets, targets)))


class SimpleReIDTripletLoss(AP3DTripletLoss):
    """AP3D's, with features normalized by F.normalize for the cosine."""

    def distances(self, inputs: Tensor) -> Tensor:
        if self.distance == "euclidean":
            return euclidean(inputs, inputs)
        normalized = F.normalize(inputs)
        return -normalized @ normalized.t()


class BiCnetTripletLoss(AP3DTripletLoss):
    """AP3D's with "consine" as its default distance, and labels moved to the GPU."""

    def __init__(self, margin: float = 0.5, distance: str = "consine", use_gpu: bool = True) -> None:
        super().__init__(margin, distance)
        self.use_gpu = use_gpu

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.use_gpu and torch.cuda.is_available():  # theirs needs a GPU
            targets = targets.cuda()
        return super().forward(inputs, targets)


class SimpleCCReIDTripletLoss(nn.Module):
    """Measures 1 - cos to the features of all ranks; has its margin in `m`; mines by masks and a large number.

    Theirs needs an initialized process group. Of the gradient, each rank gets the part of its own features.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.m = margin
        self.ranking_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs = F.normalize(inputs)
        distances = 1 - inputs @ gathered(inputs).t()
        return rank(self.ranking_loss, *by_large_number(distances, same_label(targets, gathered(targets)).float()))


class AGRLTripletLoss(_TripletLoss):
    """Torchreid's with a soft flag, log(1 + exp(gap)), which is set if it is not given."""

    def __init__(self, margin: float = 0.3, soft: bool = True) -> None:
        super().__init__(margin)
        self.soft = soft

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        d_pos, d_neg = by_loop(euclidean(inputs, inputs), same_label(targets, targets))
        return torch.log(1 + torch.exp(d_pos - d_neg)).mean() if self.soft else rank(self.ranking_loss, d_pos, d_neg)


class MGNTripletLoss(_TripletLoss):
    """Torchreid's with a mutual flag, which adds the matrix of distances to what it returns."""

    def __init__(self, margin: float = 0.3, mutual_flag: bool = False) -> None:
        super().__init__(margin)
        self.mutual = mutual_flag

    def forward(self, inputs: Tensor, targets: Tensor) -> Any:
        distances = euclidean(inputs, inputs)
        loss = rank(self.ranking_loss, *by_loop(distances, same_label(targets, targets)))
        return (loss, distances) if self.mutual else loss


class LightMBNTripletLoss(MGNTripletLoss):
    """MGN's with a margin of 0 for the soft margin."""

    def __init__(self, margin: float = 0.3, mutual_flag: bool = False) -> None:
        super().__init__(margin, mutual_flag)
        if margin == 0:
            self.ranking_loss = nn.SoftMarginLoss()


class BoxmotTripletLoss(nn.Module):
    """Torchreid's, or softplus(gap + margin) without a ranking loss."""

    def __init__(self, margin: float = 0.3, soft_margin: bool = False) -> None:
        super().__init__()
        self.margin = margin
        self.soft_margin = soft_margin
        if not soft_margin:
            self.ranking_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        d_pos, d_neg = by_loop(euclidean(inputs, inputs), same_label(targets, targets))
        if self.soft_margin:
            return F.softplus(d_pos - d_neg + self.margin).mean()
        return rank(self.ranking_loss, d_pos, d_neg)


class MMTrackingTripletLoss(_TripletLoss):
    """Torchreid's times a weight; takes any further keywords."""

    def __init__(self, margin: float = 0.3, loss_weight: float = 1.0, hard_mining: bool = True) -> None:
        super().__init__(margin)
        self.loss_weight = loss_weight
        self.hard_mining = hard_mining

    def forward(self, inputs: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
        if not self.hard_mining:
            raise NotImplementedError
        mined = by_loop(euclidean(inputs, inputs), same_label(targets, targets))
        return self.loss_weight * rank(self.ranking_loss, *mined)


class CMNASTripletLoss(nn.Module):
    """Takes the features of two modalities; a negative margin is soft; feat_norm "yes" normalizes."""

    def __init__(self, margin: float, feat_norm: str = "no") -> None:
        super().__init__()
        self.margin = margin
        self.feat_norm = feat_norm
        self.ranking_loss = make_ranking_loss(margin if margin >= 0 else None)

    def forward(self, global_feat1: Tensor, global_feat2: Tensor, target: Tensor) -> Tensor:
        if self.feat_norm == "yes":
            global_feat1, global_feat2 = F.normalize(global_feat1), F.normalize(global_feat2)
        return rank(self.ranking_loss, *by_reshape(euclidean(global_feat1, global_feat2), same_label(target, target)))


class VehicleReIDTripletLossRPTM(_TripletLoss):
    """Loops over anchors and returns both distances; under use_amp they are float16."""

    def __init__(self, margin: float = 0.3, use_amp: bool = False) -> None:
        super().__init__(margin)
        self.use_amp = use_amp

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances = euclidean(inputs, inputs)
        distances = distances.half() if self.use_amp else distances
        d_pos, d_neg = by_loop(distances, same_label(targets, targets))
        return rank(self.ranking_loss, d_pos, d_neg), d_pos, d_neg


class CrossModalTripletLoss(_TripletLoss):
    """Torchreid's with the number of anchors ranked right, as an int; takes a batch size that it does not use."""

    def __init__(self, batch_size: int, margin: float = 0.3) -> None:
        super().__init__(margin)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        d_pos, d_neg = by_loop(euclidean(inputs, inputs), same_label(targets, targets))
        return rank(self.ranking_loss, d_pos, d_neg), int((d_neg >= d_pos).sum().item())


class OpenReidTripletLoss(_TripletLoss):
    """Loops over anchors and returns the precision as well; its margin is 0 if it is not given.

    As published, it and VPM-reID's, PAST-ReID's and DomainAdaptiveReID's need PyTorch 0.3: they concatenate scalars.
    """

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__(margin)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        d_pos, d_neg = by_loop(euclidean(inputs, inputs), same_label(targets, targets))
        return rank(self.ranking_loss, d_pos, d_neg), precision(d_pos, d_neg)


class DomainAdaptiveTripletLoss(_TripletLoss):
    """Open-reid's with a third argument, the epoch, that nothing depends on, and a flag for semi-hard mining."""

    def __init__(self, margin: float = 0.0, num_instances: int = 0, use_semi: bool = True) -> None:
        super().__init__(margin)
        self.K = num_instances
        self.use_semi = use_semi

    def forward(self, inputs: Tensor, targets: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        if self.use_semi:
            raise NotImplementedError
        d_pos, d_neg = by_loop(euclidean(inputs, inputs), same_label(targets, targets))
        return rank(self.ranking_loss, d_pos, d_neg), precision(d_pos, d_neg)


class M3LTripletLoss(DomainAdaptiveTripletLoss):
    """DomainAdaptiveReID's without the epoch; returns the loss alone."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(inputs, targets, 0)[0]
