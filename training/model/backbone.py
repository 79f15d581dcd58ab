"""From a frame to feature maps: Inception-v3 as in the paper, a small network for CPUs, or another by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from training.model.config import ModelConfig
from training.model.named_backbone import FRAME_SIZE, NamedBackbone
from training.model.weights import download_inception, load_pretrained, read_weights
from training.runtime.errors import UserError

# Inception-v3's blocks in order, as torchvision names them; the auxiliary classifier branches off between the two.
_TO_MIXED_6E = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
)
_TO_MIXED_7C = ("Mixed_7a", "Mixed_7b", "Mixed_7c")


class Inception(nn.Module):
    """Torchvision's Inception-v3 up to its last inception block, with its own auxiliary classifier.

    Args:
        identities: number of people the auxiliary classifier tells apart.
        weights: "imagenet" (torchvision's download), "random", or a .pth or .safetensors file in torchvision's naming.
        auxiliary: what that classifier judges, "frames", or the mean over each "clip" of its frames' Mixed_6e maps.

    Raises:
        UserError: the weights file is missing, unreadable, or of another network.
    """

    channels = 2048
    size = (299, 299)  # (h, w) of an input frame
    spatial = (8, 8)  # (H, W) of a map

    def __init__(self, identities: int, weights: str, auxiliary: Literal["frames", "clip"] = "frames") -> None:
        from torchvision.models import inception_v3  # takes as long to import as torch

        super().__init__()
        self.auxiliary = auxiliary
        self.pretrained = weights != "random"
        state = None
        if weights == "imagenet":
            state = download_inception()
            self.pretrained = state is not None
        elif self.pretrained:
            state = read_weights(Path(weights))
        net = inception_v3(weights=None, transform_input=False, init_weights=state is None)
        # Layers after Mixed_7c are not called; their weights are dropped with them.
        net.avgpool = net.dropout = net.fc = nn.Identity()
        classifier = net.AuxLogits
        assert isinstance(classifier, nn.Module)
        classifier.fc = nn.Identity()  # replaced below, so a file may have it of any size, or not at all
        if state is not None:
            load_pretrained(net, state, weights, unused=("fc.", "AuxLogits.fc."))
        classifier.fc = nn.Linear(768, identities)
        nn.init.normal_(classifier.fc.weight, std=0.001)
        nn.init.zeros_(classifier.fc.bias)
        self.net = net

    def loadable_parameters(self) -> list[nn.Parameter]:
        """The parameters that a weights file fills: all but the auxiliary classifier's last layer."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("net.AuxLogits.fc.")]

    def forward(self, frames: Tensor, times: int = 1) -> tuple[Tensor, Tensor | None]:
        """Frames to their maps and, in training, auxiliary logits.

        Args:
            frames: (N, 3, 299, 299), clip by clip.
            times: T, frames a clip.

        Returns:
            Maps (N, 2048, 8, 8); logits of the frames, (N, identities), or of the clips, (N / T, identities), and
            `None` in eval mode.
        """
        middle = self._through(_TO_MIXED_6E, frames)  # (N, 768, 17, 17)
        logits = None
        if self.training:
            judged = middle.reshape(-1, times, *middle.shape[1:]).mean(1) if self.auxiliary == "clip" else middle
            logits = self.net.AuxLogits(judged)
        return self._through(_TO_MIXED_7C, middle), logits

    def _through(self, blocks: tuple[str, ...], maps: Tensor) -> Tensor:
        for block in blocks:
            maps = self.net.get_submodule(block)(maps)
        return maps


class Tiny(nn.Module):
    """Four convolutions, a quarter of a million parameters, no auxiliary classifier.

    Args:
        weights: "random", or a .pth or .safetensors file of this network.

    Raises:
        UserError: the weights file is missing, unreadable, or of another network.
    """

    channels = 128
    size = (64, 64)  # (h, w) of an input frame
    spatial = (8, 8)  # (H, W) of a map

    def __init__(self, weights: str) -> None:
        super().__init__()
        if weights == "imagenet":
            raise UserError("weights: got 'imagenet', wanted 'random' or a file for the tiny backbone")
        self.net = nn.Sequential(
            *_conv(3, 32, stride=2),
            *_conv(32, 64, stride=2),
            *_conv(64, 128, stride=2),
            *_conv(128, self.channels, stride=1),
        )
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.pretrained = weights != "random"
        if self.pretrained:
            load_pretrained(self.net, read_weights(Path(weights)), weights)

    def loadable_parameters(self) -> list[nn.Parameter]:
        """The parameters that a weights file fills."""
        return list(self.parameters())

    def forward(self, frames: Tensor, times: int = 1) -> tuple[Tensor, None]:
        """Frames (N, 3, 64, 64) to maps (N, 128, 8, 8), whatever the clips; there is no auxiliary classifier."""
        return self.net(frames), None


def make_backbone(config: ModelConfig, identities: int) -> Inception | Tiny | NamedBackbone:
    """Make the backbone; an auxiliary classifier has so many identities."""
    if "/" in config.backbone:
        return NamedBackbone(config.backbone, config.weights, config.frame_size or FRAME_SIZE)
    if config.backbone == "tiny":
        return Tiny(config.weights)
    return Inception(identities, config.weights, config.auxiliary)


def _conv(channels_in: int, channels_out: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
