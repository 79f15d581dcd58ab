"""Third-party modules as users have them, in names, shapes and layouts: the authors' units and batch-hard losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNormReLU(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden, eps=0.001)

    def forward(self, v: Tensor) -> Tensor:
        return torch.relu_(self.bn(self.conv(v)))


class RRU(nn.Module):
    """rru-reid: attention by convolutions, the appearance difference S - X_t; returns (B, C, T, H, W)."""

    def __init__(self, input_size: int, size: int = 8, hidden: int = 256, spatial_hidden: int = 128) -> None:
        super().__init__()
        self.reduce_dim_z = ConvNormReLU(2 * input_size, hidden)
        self.s_atten_z = nn.Sequential(
            nn.Conv2d(1, spatial_hidden, size, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(spatial_hidden, size * size, 1, bias=False),
        )
        self.c_atten_z = nn.Sequential(nn.AvgPool2d(size), nn.Conv2d(hidden, input_size, 1, bias=False))

    def gate(self, v: Tensor) -> Tensor:
        y = self.reduce_dim_z(v)
        where = self.s_atten_z(y.mean(1, keepdim=True)).view(len(y), 1, *y.shape[2:])
        return torch.sigmoid(where * self.c_atten_z(y))

    def refined(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.unsqueeze(0)
        past, previous, out = x[:, 0], x[:, 0], []
        for present in x.unbind(1):
            z = self.gate(torch.cat((past - present, present - previous), 1))
            past = (1 - z) * past + z * present
            previous = present
            out.append(past)
        return torch.stack(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.refined(x)


class FuseNet(RRU):
    """person-reid-lib: the unit, then convolutions over space and time; returns clips (B, hidden_size) and strips."""

    def __init__(self, input_size: int, hidden_size: int, size: int = 8, hidden: int = 256, spatial_hidden: int = 128):
        super().__init__(input_size, size, hidden, spatial_hidden)
        self.hidden_size = hidden_size
        self.t_info = nn.Sequential(
            nn.Conv3d(input_size, hidden, 1, bias=False),
            nn.BatchNorm3d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv3d(hidden, hidden_size, 3, padding=1, bias=False),
            nn.BatchNorm3d(hidden_size),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AvgPool2d(size)

    def forward(self, x: Tensor, is_training: bool = True) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        maps = self.refined(x)
        clips = self.pool(self.t_info(maps).mean(dim=2)).view(len(maps), -1)
        return clips, maps.mean(dim=4).mean(dim=2)


class TripletLoss(nn.Module):
    """torchreid: batch-hard with Euclidean distances, their squares clamped, and MarginRankingLoss."""

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin
        self.ranking_loss = nn.MarginRankingLoss(margin=margin)

    def distances(self, inputs: Tensor) -> Tensor:
        square = inputs.pow(2).sum(dim=1, keepdim=True)
        return (square + square.t() - 2 * inputs @ inputs.t()).clamp(min=1e-12).sqrt()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        distances, same = self.distances(inputs), targets[:, None] == targets[None]
        rows = list(zip(distances, same, strict=True))
        hardest_positive = torch.stack([row[mask].max() for row, mask in rows])
        hardest_negative = torch.stack([row[~mask].min() for row, mask in rows])
        return self.ranking_loss(hardest_negative, hardest_positive, torch.ones_like(hardest_negative))


class BatchHardTripletLoss(TripletLoss):
    """person-reid-lib: the same for batches with equally many images of each person."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        distances, same = self.distances(inputs), targets[:, None] == targets[None]
        hardest_positive = distances[same].view(len(inputs), -1).amax(1)
        hardest_negative = distances[~same].view(len(inputs), -1).amin(1)
        return self.ranking_loss(hardest_negative, hardest_positive, torch.ones_like(hardest_negative))
