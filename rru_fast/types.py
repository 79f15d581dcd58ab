"""Public types: the outputs of `refine`, and the values that options take."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple

Attention = Literal["both", "spatial", "channel"]
Inputs = Literal["appearance+motion", "appearance", "raw"]
Metric = Literal["euclidean", "cosine"]
Reduction = Literal["mean", "none"]


class State(NamedTuple):
    """Where a video stands between two chunks: the last frame's maps and their refinement, both (B, C, H, W)."""

    x: Tensor
    s: Tensor


class Refined(NamedTuple):
    """What `refine` returns.

    features: S, (B, T, C, H, W).
    strips: S averaged over time and width, (B, C, H).
    state: what the video's next chunk starts from; `None` when batch statistics were used (training).
    """

    features: Tensor
    strips: Tensor
    state: State | None


for _returned in (State, Refined):  # so that torch.export can save a program that returns them
    _register_namedtuple(_returned, serialized_type_name=f"rru_fast.{_returned.__name__}")
