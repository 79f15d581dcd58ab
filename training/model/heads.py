"""What turns the maps of a clip into one feature: the paper's baseline, LSTM and STIM."""

from __future__ import annotations

from torch import Tensor, nn

from training.recipes.recipe import Recipe


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
            nn.Conv3d(width, width, 3, padding=1, bias=False),
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


def make_head(recipe: Recipe, channels: int) -> Baseline | LSTM | STIM:
    """The head a recipe asks for, on maps of so many channels."""
    match recipe.head:
        case "baseline":
            return Baseline(channels)
        case "lstm":
            return LSTM(channels, recipe.head_width)
        case "stim":
            return STIM(channels, recipe.head_width)
