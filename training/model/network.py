"""The paper's network, from frames to a feature, the strips and the identity logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from rru_fast import State
from training.model.backbone import make_backbone
from training.model.config import ModelConfig
from training.model.ghost_norm import use_ghost_norm
from training.model.heads import make_head
from training.model.operators import Ops, operators
from training.model.pretrained import Pretrained
from training.runtime.errors import UserError


class Output(NamedTuple):
    """A network's output for a batch of clips.

    feature: f, (B, D), what clips are compared by.
    strips: (B, C, H), eq. 9; `None` without an RRU.
    logits: (B, identities).
    auxiliary: logits of every frame, (B * T, identities), clip-major, or of every clip, (B, identities); `None` in
        eval mode or without such a classifier.
    """

    feature: Tensor
    strips: Tensor | None
    logits: Tensor
    auxiliary: Tensor | None


class StreamState(NamedTuple):
    """State passed from one chunk of a clip to the next: the RRU's, and the one that the head's `stream` returns."""

    rru: State | None = None
    head: Any = None


class Network(nn.Module, Pretrained):
    """Backbone, RRU where there is to be one, clip head, and the classifier block that training hangs on.

    `Network.from_pretrained(folder or name)` loads one from a folder or the Hugging Face Hub; `push_to_hub` puts it
    there.

    Args:
        config: which of each.
        identities: number of people the classifier tells apart.
        ops: "fast" for the library's RRU, "reference" for its plain PyTorch twin; the state_dict is the same.
        cuda_graph: whether the library's RRU runs as CUDA graphs.

    Raises:
        UserError: the weights do not fit the backbone.
    """

    def __init__(self, config: ModelConfig, identities: int, ops: Ops, cuda_graph: bool = False) -> None:
        super().__init__()
        self.config, self.identities, self.ops = config, identities, ops
        self.backbone = make_backbone(config, identities)
        channels, spatial = self.backbone.channels, self.backbone.spatial
        self.rru: nn.Module | None = None
        if config.rru != "none":
            self.rru = operators(ops).RRU(
                channels,
                spatial,
                attention=config.rru,
                inputs=config.rru_inputs,
                bn_groups=config.bn_groups,
                cuda_graph=cuda_graph,
            )
        self.head = make_head(config, channels)
        self.classifier = _classifier(config, self.head.features, identities)
        if config.bn_groups > 1:
            for part in (self.backbone, self.head, self.classifier):  # the RRU does it itself
                use_ghost_norm(part, config.bn_groups)

    def embed(self, maps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, T, C, H, W) to the feature (B, D) and the strips (B, C, H), or `None` without an RRU."""
        strips = None
        if self.rru is not None:
            refined = self.rru(maps)
            maps, strips = refined.features, refined.strips
        return self.head(maps), strips

    def stream(self, maps: Tensor, lengths: Tensor, last: bool, carried: StreamState) -> tuple[Tensor, StreamState]:
        """Return a chunk's part of the sum over a clip's frames, of which the feature is the mean; eval mode only.

        Args:
            maps: (B, T, C, H, W), the chunk's T frames of B clips.
            lengths: int64 (B,), how many of them exist, from 1 to T; all, unless the chunk is the last.
            last: whether the clips end with this chunk.
            carried: what the chunk before gave back, or `StreamState()`.

        Returns:
            The sum (B, D), and what the next chunk is to be given.
        """
        state = None
        if self.rru is not None:
            refined = self.rru(maps, lengths, carried.rru)
            maps, state = refined.features, refined.state
        total, of_head = self.head.stream(maps, lengths, last, carried.head)
        return total, StreamState(state, of_head)

    def forward(self, frames: Tensor) -> Output:
        """Clips of frames (B, T, 3, h, w), float, normalized.

        Raises:
            UserError: the shape is another.
        """
        h, w = self.backbone.size
        if frames.dim() != 5 or frames.shape[2:] != (3, h, w):
            raise UserError(f"frames: got shape {tuple(frames.shape)}, wanted (clips, frames a clip, 3, {h}, {w})")
        maps, auxiliary = self.backbone(frames.flatten(0, 1), times=frames.shape[1])
        feature, strips = self.embed(maps.unflatten(0, frames.shape[:2]))
        return Output(feature, strips, self.classifier(feature), auxiliary)


def _classifier(config: ModelConfig, features: int, identities: int) -> nn.Sequential:
    width = config.classifier_width
    first, norm, last = nn.Linear(features, width), nn.BatchNorm1d(width), nn.Linear(width, identities)
    official = config.classifier == "official"
    if official:
        nn.init.normal_(norm.weight, mean=1.0, std=0.02)
    activation = nn.LeakyReLU(0.1, inplace=True) if official else nn.ReLU(inplace=True)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    # Near zero, so that training starts from no opinion: the identity loss begins at log(identities).
    nn.init.normal_(last.weight, std=0.001)
    nn.init.zeros_(first.bias)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, norm, activation, nn.Dropout(0.5), last)
