"""One call of `refine` as the host code of both passes sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton._host import Maps


@dataclass
class Call:
    """The arguments of one call as the kernels of both passes take them."""

    x: Maps
    w: Tensor  # (D, C) or (D, 2C), in the maps' dtype
    gamma: Tensor
    beta: Tensor
    w_s1: Tensor | None
    w_s2: Tensor | None
    w_c: Tensor | None
    lengths: Tensor | None
    state_x: Maps | None
    state_s: Maps | None
    inputs: str
    groups: int
    training: bool
    eps: float

    def __post_init__(self) -> None:
        self.clips, self.frames, self.channels, self.height, self.width = self.x.tensor.shape
        self.positions = self.height * self.width
        self.d = self.w.shape[0]
        self.a = 0 if self.w_s1 is None else self.w_s1.shape[0]
        self.start = 0 if self.state_s is not None else 1
        self.steps = self.frames - self.start
        self.sum = torch.promote_types(self.x.tensor.dtype, torch.float32)
        self.keeps_state = self.x.tensor.dtype != self.sum
        self.clips_per_group = self.clips // self.groups
        read = [maps for maps in (self.x, self.state_x, self.state_s) if maps is not None]
        self.wide = self.channels * self.positions >= 2**31 or any(maps.wide for maps in read)
        self.w_s, self.w_x = self.halves(self.w)
        # S_1 = X_1, so A = M at the first step, and one product with the sum of both halves is enough.
        self.shares_first = self.inputs == "appearance+motion" and self.start == 1 and self.steps > 0
        self.w_first = self.w_s + self.w_x if self.shares_first and self.w_x is not None else None

    def halves(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns of w that multiply the operand with S, and those that multiply the other one."""
        if self.inputs == "appearance":
            return w, None
        first, second = w.chunk(2, 1)
        return (second, first) if self.inputs == "raw" else (first, second)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised, in the type of arithmetic."""
        return self.x.tensor.new_empty(shape, dtype=self.sum)

    def counters(self, count: int) -> Tensor:
        """Where programs count who has arrived."""
        return self.x.tensor.new_zeros(count, dtype=torch.int32)

    def kind(self) -> tuple[Any, ...]:
        """All that configs depend on, the dtype apart."""
        sizes = (self.clips, self.channels, self.height, self.width, self.d, self.a, self.groups)
        channels_last = self.x.channel == 1 and self.channels > 1
        layout = "channels-last" if channels_last else "even" if host.even(self.x.tensor, 3) else "odd"
        return *sizes, self.inputs, self.training, layout, host.conv_precision(self.x.tensor.dtype)

    def input_segments(self, first_step: int = 0) -> list[Segment]:
        """Operands of w_x at the steps from `first_step`."""
        return self._segments(first_step, None if self.inputs == "raw" else (self.state_x, self.x))

    def recurrent_segments(self, refined: Maps) -> list[Segment]:
        """Operands of w_s at all steps; refined: S."""
        segments = self._segments(0, (self.state_s, refined))
        if self.inputs == "raw":
            return [s._replace(maps=s.subtracted, subtracted=None) for s in segments if s.subtracted is not None]
        return segments

    def _segments(self, first_step: int, past: tuple[Maps | None, Maps] | None) -> list[Segment]:
        """X_t of each step, less the frame before it in `past`: in a state at t = 0, else at t - 1."""
        segments = []
        if self.start == 0 and first_step == 0:
            segments.append(Segment(0, 1, self.x, None if past is None else past[0]))
        first = max(first_step, 1 - self.start)
        if first < self.steps:
            t = self.start + first
            less = None if past is None else frames_from(past[1], t - 1)
            segments.append(Segment(first, self.steps, frames_from(self.x, t), less))
        return segments


class Saved(NamedTuple):
    """Outputs that the forward saved; shapes as in rru_fast::refine."""

    refined: Maps
    mean: Tensor
    var: Tensor
    u: Tensor
    z_s: Tensor
    z_c: Tensor
    h: Tensor


class Segment(NamedTuple):
    """Consecutive steps whose operand is `maps` less `subtracted`, frame by frame."""

    first: int
    end: int
    maps: Maps
    subtracted: Maps | None


def frames_from(maps: Maps, first: int) -> Maps:
    """The frames starting with `first`."""
    return maps._replace(tensor=maps.tensor[:, first:])


def make_call(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None,
    w_s2: Tensor | None,
    w_c: Tensor | None,
    lengths: Tensor | None,
    state_x: Tensor | None,
    state_s: Tensor | None,
    inputs: str,
    training: bool,
    eps: float,
    bn_groups: int,
) -> Call:
    """Build the call, copying tensors whose layout the kernels cannot take."""
    return Call(
        host.maps(x),
        w.to(x.dtype).contiguous(),
        gamma.contiguous(),
        beta.contiguous(),
        None if w_s1 is None else w_s1.contiguous(),
        None if w_s2 is None else w_s2.contiguous(),
        None if w_c is None else w_c.contiguous(),
        lengths,
        None if state_x is None else host.maps(state_x[:, None]),
        None if state_s is None else host.maps(state_s[:, None]),
        inputs,
        bn_groups if training else 1,
        training,
        eps,
    )
