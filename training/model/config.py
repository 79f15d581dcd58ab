"""Options of the network and of its losses; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from training.runtime.errors import UserError
from training.runtime.fields import Config, Switch, check_count


@dataclass(frozen=True)
class ModelConfig(Config):
    """The network.

    Raises:
        UserError: an option has no such value.
    """

    backbone: str = "inception_v3"
    """inception_v3; tiny, which brings quick's weights, widths and learning rates with it; or a network of a library as
    torchvision/NAME or timm/NAME."""
    frame_size: tuple[int, int] | None = None
    """Height and width of a library's backbone's input, 256 128 if None; the others have sizes of their own."""
    weights: str = "imagenet"
    """The backbone's start: imagenet, random, or a .pth or .safetensors file."""
    auxiliary: Literal["frames", "clip"] = "frames"
    """Input of Inception-v3's auxiliary classifier: each frame, or a clip's mean over time; tiny has none."""
    rru: Literal["none", "both", "spatial", "channel"] = "both"
    """The RRU's attention, eq. 3 and 4; none for a network without an RRU."""
    rru_inputs: Literal["appearance+motion", "appearance", "raw"] = "appearance+motion"
    """Inputs of the RRU's gate: both differences of eq. 1 and 2, that of appearance, or frame and state themselves."""
    bn_groups: int = 1
    """Groups of clips with batch statistics of their own, in every batch norm; 4 stands for the authors' GPUs."""
    head: Literal["baseline", "lstm", "stim"] = "stim"
    """From refined maps to a clip's feature: their mean, an LSTM, or the paper's STIM."""
    head_width: int = 256
    """Channels of an LSTM or STIM feature."""
    classifier: Literal["paper", "official"] = "paper"
    """Layers before the identities: FC, BN, ReLU, dropout, FC, or as the authors' code has it."""
    classifier_width: int = 512
    """Channels of that block."""

    def validate(self) -> None:
        library, _, name = self.backbone.partition("/")
        if self.backbone not in ("inception_v3", "tiny") and (library not in ("torchvision", "timm") or not name):
            wanted = "inception_v3, tiny, torchvision/NAME or timm/NAME"
            raise UserError(f"backbone: got {self.backbone!r}, wanted {wanted}")
        if self.frame_size is not None and not name:
            raise UserError(f"frame_size: got {self.frame_size} with {self.backbone}, which has a size of its own")
        for side in self.frame_size or ():
            check_count("frame_size", side)
        check_count("bn_groups", self.bn_groups)
        check_count("head_width", self.head_width)
        check_count("classifier_width", self.classifier_width)


@dataclass(frozen=True)
class LossConfig(Config):
    """The losses: L_c, always, with L_v and L_p.

    Raises:
        UserError: an option has no such value.
    """

    video_loss: Switch = True
    """The triplet loss L_v on clips' features."""
    part_loss: Switch = True
    """The triplet loss L_p on strips, eq. 10."""
    margin: float = 0.4
    """Of both triplet losses."""
    auxiliary_weight: float = 1.0
    """Weight of the auxiliary classifier's cross-entropy in L_c, where that of the identity is 1."""

    def validate(self) -> None:
        if not math.isfinite(self.margin):
            raise UserError(f"margin: got {self.margin}, wanted a finite number")
        if not 0 <= self.auxiliary_weight < math.inf:
            raise UserError(f"auxiliary_weight: got {self.auxiliary_weight}, wanted a number, at least 0")
