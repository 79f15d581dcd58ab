"""MMT's batch-hard triplet losses, and those of repositories built on it, stated in our own words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.implementations.loss_parts import by_sort, euclidean, precision, rank, same_label


class MMTTripletLoss(nn.Module):
    """Sorts distances with masks, of normalized features if told so at construction; returns the precision as well."""

    def __init__(self, margin: float, normalize_feature: bool = False) -> None:
        super().__init__()
        self.margin = margin
        self.normalize_feature = normalize_feature
        self.margin_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, emb: Tensor, label: Tensor) -> Any:
        emb = F.normalize(emb) if self.normalize_feature else emb
        d_pos, d_neg = by_sort(euclidean(emb, emb), same_label(label, label).float())
        return rank(self.margin_loss, d_pos, d_neg), precision(d_pos, d_neg)


class IDMTripletLoss(MMTTripletLoss):
    """MMT's that returns the loss alone."""

    def forward(self, emb: Tensor, label: Tensor) -> Any:
        return super().forward(emb, label)[0]


class InstructReIDTripletLoss(MMTTripletLoss):
    """MMT's with a third argument that it does not use."""

    def forward(self, emb: Tensor, label: Tensor, clot_feats_s: Tensor | None = None) -> Any:
        return super().forward(emb, label)


class KRKCTripletLoss(MMTTripletLoss):
    """MMT's without normalization; a third argument has the candidates; mid_hard takes the second-farthest positive."""

    def __init__(self, margin: float, normalize_feature: bool = False, mid_hard: bool = False) -> None:
        super().__init__(margin, normalize_feature)
        self.mid_hard = mid_hard

    def forward(self, emb: Tensor, label: Tensor, emb_: Tensor | None = None) -> Any:
        distances = euclidean(emb, emb if emb_ is None else emb_)
        nth = int(self.mid_hard and emb_ is None)
        d_pos, d_neg = by_sort(distances, same_label(label, label).float(), nth)
        loss = rank(self.margin_loss, d_pos, d_neg)
        return (loss, precision(d_pos, d_neg)) if emb_ is None else loss


class MMTSoftTripletLoss(nn.Module):
    """Log-softmax of both distances; takes a teacher's features, unused with a margin; a margin of 0 is soft."""

    def __init__(self, margin: float | None = None, normalize_feature: bool = False) -> None:
        super().__init__()
        self.margin = margin
        self.normalize_feature = normalize_feature

    def forward(self, emb1: Tensor, emb2: Tensor, label: Tensor) -> Tensor:
        if self.margin is None:
            raise NotImplementedError("the distances of emb2 in place of the margin")
        emb1 = F.normalize(emb1) if self.normalize_feature else emb1
        mined = by_sort(euclidean(emb1, emb1), same_label(label, label).float())
        of_pos, of_neg = torch.stack(mined, dim=1).log_softmax(dim=1).unbind(1)
        return -(self.margin * of_pos + (1 - self.margin) * of_neg).mean()
