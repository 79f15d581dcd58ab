"""Public types: outputs of `refine`, and values of options."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple

Attention = Literal["both", "spatial", "channel"]
Inputs = Literal["appearance+motion", "appearance", "raw"]
Metric = Literal["euclidean", "cosine"]
Reduction = Literal["mean", "sum", "none"]


class State(NamedTuple):
    """State of a video between two chunks: X and S of the last frame, both (B, C, H, W)."""

    x: Tensor
    s: Tensor


class Refined(NamedTuple):
    """Outputs of `refine`.

    features: S, (B, T, C, H, W).
    strips: S averaged over time and width, (B, C, H).
    state: state for the video's next chunk; None if batch statistics were used (training).
    """

    features: Tensor
    strips: Tensor
    state: State | None


for _returned in (State, Refined):  # torch.export.save needs the outputs' types registered
    _register_namedtuple(_returned, serialized_type_name=f"rru_fast.{_returned.__name__}")
