"""Heads from the maps of a clip to its feature: the baseline, the LSTM and STIM.

Each says something of every frame, and the feature is the mean over the frames. So a clip too long for one go is
streamed, in eval mode: `stream` returns what a chunk's frames add to the sum over all frames, and what the next needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.config import ModelConfig


class Baseline(nn.Module):
    """The mean over time and space.

    Args:
        channels: C of the maps; the feature has as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = channels

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, T, C, H, W) to features (B, C)."""
        return maps.mean((1, 3, 4))

    def stream(self, maps: Tensor, lengths: Tensor, last: bool, carried: None) -> tuple[Tensor, None]:
        """Maps (B, T, C, H, W) of a chunk to the sum (B, C) over its frames, of which `lengths` (B,) exist each."""
        return _sum(maps.mean((3, 4)), lengths), None


class LSTM(nn.Module):
    """The mean over space, an LSTM over time, the mean of its outputs.

    Args:
        channels: C of the maps.
        width: D, the LSTM's hidden size.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.features = width
        self.lstm = nn.LSTM(channels, width, batch_first=True)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, T, C, H, W) to features (B, D)."""
        outputs: Tensor = self.lstm(maps.mean((3, 4)))[0]
        return outputs.mean(1)

    def stream(
        self, maps: Tensor, lengths: Tensor, last: bool, carried: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Maps (B, T, C, H, W) of a chunk to the sum (B, D) over its frames, and the LSTM's state after them.

        Args:
            maps: of the chunk.
            lengths: (B,), how many of its T frames exist; the state is right where all do.
            last: whether no chunk follows.
            carried: the state after the chunk before; `None` at the first.
        """
        outputs, carried = self.lstm(maps.mean((3, 4)), carried)
        return _sum(outputs, lengths), carried


class _Conv3x3x3(nn.Conv3d):
    """A 3x3x3 convolution over maps (B, C, T, H, W) that keeps their shape.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to as many."""
        if self.training and maps.device.type == "cpu" and maps.shape[2] == 2:
            # Of two frames that it pads itself, oneDNN (3.10, in bfloat16) adds memory nobody wrote to the gradient of
            # the weights. The same zeros as frames are right. In eval mode an export's T stays free.
            return F.conv3d(F.pad(maps, (0, 0, 0, 0, 1, 1)), self.weight, padding=(0, 1, 1))
        return super().forward(maps)


class STIM(nn.Module):
    """The Spatial-Temporal clues Integration Module: two 3-D convolutions, then the mean over time and space.

    Args:
        channels: C of the maps.
        width: D, the channels of both convolutions.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.features = width
        self.net = nn.Sequential(
            nn.Conv3d(channels, width, 1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            _Conv3x3x3(width),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        for module in self.net.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, T, C, H, W) to features (B, D)."""
        clues: Tensor = self.net(maps.transpose(1, 2))
        return clues.mean((2, 3, 4))

    def stream(self, maps: Tensor, lengths: Tensor, last: bool, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps (B, T, C, H, W) of a chunk to the sum (B, D) over the frames it settles, and the next chunk's halo.

        A frame is settled once its successor is known: with a chunk that is not the last, all but its last frame, and
        the last of the chunk before.

        Args:
            maps: of the chunk.
            lengths: (B,), how many of its T frames exist.
            last: whether no chunk follows.
            carried: up to two frames (B, D, 1 or 2, H, W) out of the first convolution; `None` at the first chunk.
        """
        clues: Tensor = self.net[:3](maps.transpose(1, 2))
        # Beyond a clip's end the second convolution has to meet zeros, as its own padding is.
        clues = clues.masked_fill(~_exist(lengths, maps.shape[1])[:, None, :, None, None], 0)
        earlier = 0  # frames of the chunk before that are settled now
        settled = slice(0, None if last else -1)
        if carried is not None:
            earlier = 1
            # Of two frames the first is there for the second's sake; a lone one is the clip's first, not settled yet.
            settled = slice(carried.shape[2] - 1, settled.stop)
            clues = torch.cat((carried, clues), 2)
        outputs: Tensor = self.net[3:](clues)[:, :, settled]
        return _sum(outputs.mean((3, 4)).transpose(1, 2), lengths + earlier), clues[:, :, -2:]


def make_head(config: ModelConfig, channels: int) -> Baseline | LSTM | STIM:
    """Make the head, on maps of so many channels."""
    match config.head:
        case "baseline":
            return Baseline(channels)
        case "lstm":
            return LSTM(channels, config.head_width)
        case "stim":
            return STIM(channels, config.head_width)


def _exist(lengths: Tensor, frames: int) -> Tensor:
    return torch.arange(frames, device=lengths.device) < lengths[:, None]  # (B, T)


def _sum(of_frames: Tensor, lengths: Tensor) -> Tensor:
    """The sum of (B, T, D) over the frames that exist, (B, D)."""
    return of_frames.masked_fill(~_exist(lengths, of_frames.shape[1])[:, :, None], 0).sum(1)
