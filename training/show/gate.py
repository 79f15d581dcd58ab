"""The RRU's gate Z_t, which the operators use up and do not return."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast.reference import RRU


def gate(rru: RRU, x: Tensor, s_before: Tensor, x_before: Tensor) -> Tensor:
    """Z_t by eq. 1-4, in the mode of the RRU's batch norm.

    Args:
        rru: its weights and variant.
        x: X_t, (N, C, H, W).
        s_before, x_before: S_{t-1} and X_{t-1}, as large.

    Returns:
        (N, C, H, W), from 0, which keeps the past, to 1, which takes the frame.
    """
    seen = {
        "appearance+motion": (x - s_before, x - x_before),
        "appearance": (x - s_before,),
        "raw": (x, s_before),
    }[rru.inputs]
    y = F.relu(rru.transition_norm(rru.transition(torch.cat(seen, 1))))  # eq. 1: (N, D, H, W)
    logits = x.new_ones(())
    if rru.attention != "channel":  # eq. 2
        logits = logits * rru.spatial_attention(y.mean(1).flatten(1)).view(-1, 1, *y.shape[2:])
    if rru.attention != "spatial":  # eq. 3
        logits = logits * rru.channel_attention(y.mean((2, 3)))[:, :, None, None]
    return logits.sigmoid().expand_as(x)  # eq. 4
