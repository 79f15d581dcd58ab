"""The training loss: L_c + L_v + L_p."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.config import LossConfig
from training.model.network import Output
from training.model.operators import Ops, operators
from training.runtime.errors import UserError


class Losses(nn.Module):
    """Cross-entropy of identities, the auxiliary one weighted; batch-hard triplets on the clips' features and strips.

    Args:
        config: which of them count, the margin and the weight.
        ops: "fast" for the library's triplet loss, "reference" for its plain PyTorch twin.
        gather: whether triplets are formed among the clips of all processes; cross-entropy is of each one's own.
    """

    def __init__(self, config: LossConfig, ops: Ops, gather: bool = False) -> None:
        super().__init__()
        self.video, self.part = config.video_loss, config.part_loss
        self.auxiliary_weight = config.auxiliary_weight
        self.triplet = operators(ops).BatchHardTripletLoss(margin=config.margin, gather=gather)

    def forward(self, output: Output, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, a scalar, and the parts it is the sum of, by name.

        Args:
            output: what the network said of B clips.
            labels: (B,) int64, who each clip shows.

        Raises:
            UserError: the labels are not one a clip.
        """
        clips = len(output.logits)
        if labels.shape != (clips,):
            raise UserError(f"labels: got shape {tuple(labels.shape)}, wanted ({clips},), one a clip")
        parts = {"identity": F.cross_entropy(output.logits, labels)}
        if output.auxiliary is not None:
            judged = labels.repeat_interleave(len(output.auxiliary) // clips)  # T times each, or once
            parts["auxiliary"] = self.auxiliary_weight * F.cross_entropy(output.auxiliary, judged)
        if self.video:
            parts["video"] = self.triplet(_full(output.feature), labels)
        if self.part and output.strips is not None:
            strips = _full(output.strips).permute(2, 0, 1)  # (H, B, C): a group a strip, eq. 10
            parts["part"] = self.triplet(strips, labels)
        return torch.stack(list(parts.values())).sum(), parts


def _full(features: Tensor) -> Tensor:
    """Float32 at least: a loss is a small difference of distances, which 16 bits of autocast would round away."""
    return features.to(torch.promote_types(features.dtype, torch.float32))
