"""What turns one frame into maps: Inception-v3 as in the paper, or a small network for CPUs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torchvision.models import Inception3, inception_v3

from training.errors import UserError
from training.model.weights import download_inception, load_weights, read_weights
from training.recipes.recipe import Recipe


class Inception(nn.Module):
    """Torchvision's Inception-v3 up to its last inception block, with its own auxiliary classifier.

    Args:
        identities: number of people the auxiliary classifier tells apart.
        weights: "imagenet" (torchvision's download), "random", or a .pth or .safetensors file in torchvision's naming.

    Raises:
        UserError: the weights file is missing, unreadable, or of another network.
    """

    channels = 2048
    size = (299, 299)  # (h, w) of an input frame
    spatial = (8, 8)  # (H, W) of a map

    def __init__(self, identities: int, weights: str) -> None:
        super().__init__()
        self.pretrained = weights != "random"
        state = None
        if weights == "imagenet":
            state = download_inception()
            self.pretrained = state is not None
        elif self.pretrained:
            state = read_weights(Path(weights))
        net: Inception3 = inception_v3(weights=None, transform_input=False, init_weights=state is None)
        # Beyond Mixed_7c only the flattening is left, which forward undoes.
        net.avgpool = net.dropout = net.fc = nn.Identity()
        if state is not None:
            kept = {key: value for key, value in state.items() if not key.startswith("fc.")}
            load_weights(net, kept, weights)
        auxiliary = net.AuxLogits
        assert isinstance(auxiliary, nn.Module)
        auxiliary.fc = nn.Linear(768, identities)
        nn.init.normal_(auxiliary.fc.weight, std=0.001)
        nn.init.zeros_(auxiliary.fc.bias)
        self.net = net

    def loadable_parameters(self) -> list[nn.Parameter]:
        """The parameters that a weights file fills: all but the auxiliary classifier's last layer."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("net.AuxLogits.fc.")]

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Frames (N, 3, 299, 299) to maps (N, 2048, 8, 8) and, in training, auxiliary logits (N, identities)."""
        out = self.net(frames)
        flat, auxiliary = out if self.training else (out, None)
        return flat.unflatten(1, (self.channels, *self.spatial)), auxiliary


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
            load_weights(self.net, read_weights(Path(weights)), weights)

    def loadable_parameters(self) -> list[nn.Parameter]:
        """The parameters that a weights file fills."""
        return list(self.parameters())

    def forward(self, frames: Tensor) -> tuple[Tensor, None]:
        """Frames (N, 3, 64, 64) to maps (N, 128, 8, 8); there is no auxiliary classifier."""
        return self.net(frames), None


def make_backbone(recipe: Recipe, identities: int) -> Inception | Tiny:
    """The backbone a recipe asks for; `identities` is what an auxiliary classifier tells apart."""
    return Tiny(recipe.weights) if recipe.backbone == "tiny" else Inception(identities, recipe.weights)


def _conv(channels_in: int, channels_out: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
