"""Backbones of torchvision and timm, by name."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from training.model.weights import first_line, load_pretrained, read_weights
from training.runtime.command import need
from training.runtime.errors import UserError

FRAME_SIZE = (256, 128)  # (h, w), the field's usual
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AFTER_THE_MAPS = ("avgpool", "flatten", "dropout", "classifier", "fc", "head", "heads")  # torchvision's names
_NOT_FETCHED = (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError)


class NamedBackbone(nn.Module):
    """A network of torchvision or timm up to its last feature maps.

    Frames, in [-1, 1] as for the other backbones, are normalized as the network's ImageNet weights expect them.

    Args:
        name: "torchvision/NAME" or "timm/NAME".
        weights: "imagenet" (the library's download), "random", or a .pth or .safetensors file in its naming.
        size: (h, w) of an input frame, pixels.

    Raises:
        UserError: the library is missing or has no such network, its output is not maps, or the weights file does not
            fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str, size: tuple[int, int] = FRAME_SIZE) -> None:
        super().__init__()
        library, _, model = name.partition("/")
        make = {"torchvision": _torchvision, "timm": _timm}[library]
        self.size = size
        self.pretrained = weights != "random"
        if weights == "imagenet":
            try:
                self.net, mean, std = make(model, pretrained=True)
            except _NOT_FETCHED as error:
                warnings.warn(f"no ImageNet weights ({first_line(error)}): {name} starts at random", stacklevel=4)
                self.pretrained = False
        if weights != "imagenet" or not self.pretrained:
            self.net, mean, std = make(model, pretrained=False)
        if weights not in ("imagenet", "random"):
            unused = tuple(f"{part}." for part in _AFTER_THE_MAPS)
            load_pretrained(self.net, read_weights(Path(weights)), weights, unused)
        self.register_buffer("mean", _column(mean), persistent=False)
        self.register_buffer("std", _column(std), persistent=False)
        self.channels, self.spatial = self._shape(name)

    def loadable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that a weights file fills."""
        return list(self.parameters())

    def forward(self, frames: Tensor, times: int = 1) -> tuple[Tensor, None]:
        """Frames (N, 3, h, w), in [-1, 1], to maps (N, C, H, W); there is no auxiliary classifier."""
        return self.net(((frames + 1) / 2 - self.mean) / self.std), None

    @torch.no_grad()
    def _shape(self, name: str) -> tuple[int, tuple[int, int]]:
        """Return C and (H, W) of the maps, from a frame of zeros."""
        training = self.net.training
        try:
            maps = self.net.eval()(torch.zeros(1, 3, *self.size))
        except Exception as error:  # a network may refuse a size by any
            raise UserError(f"backbone: {name} takes no frames of {self.size} ({first_line(error)})") from error
        finally:
            self.net.train(training)
        # In timm some return (B, H, W, C); it says what C may be.
        channels = [getattr(self.net, own) for own in ("num_features", "head_hidden_size") if hasattr(self.net, own)]
        if not isinstance(maps, Tensor) or maps.dim() != 4 or (channels and maps.shape[1] not in channels):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise UserError(f"backbone: {name} returns {got} for a frame, wanted maps (1, C, H, W)")
        return maps.shape[1], (maps.shape[2], maps.shape[3])


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    from torchvision import models  # takes as long to import as torch

    if name not in models.list_models(module=models) or name in ("googlenet", "inception_v3"):
        wanted = "one of torchvision.models.list_models() without auxiliary classifiers"
        raise UserError(f"backbone: got {name!r} of torchvision, wanted {wanted}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how some are initialized
        net = models.get_model(name, weights="DEFAULT" if pretrained else None)
    maps = OrderedDict(takewhile(lambda child: child[0] not in _AFTER_THE_MAPS, net.named_children()))
    if isinstance(net, models.DenseNet):
        maps["relu"] = nn.ReLU(inplace=True)  # its own forward calls the function
    return nn.Sequential(maps), IMAGENET_MEAN, IMAGENET_STD


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    timm: Any = need("timm", "backbones")
    if not timm.is_model(name):
        raise UserError(f"backbone: got {name!r} of timm, wanted one of timm.list_models()")
    net: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="")
    return net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"]


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]  # (3, 1, 1)
