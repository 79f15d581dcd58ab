"""One call of `refine` as the host code of both passes sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton._host import Maps

# What stands for maps, of many frames and of one, that there are not.
NOTHING = (None, 0, 0, 0, 0)
NO_FRAME = (None, 0, 0, 0)


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

    def halves(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The columns of w that multiply what holds S, and those that multiply what does not."""
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
        """What a plan depends on, beside the dtype."""
        sizes = (self.clips, self.channels, self.height, self.width, self.d, self.a, self.groups)
        channels_last = self.x.channel == 1 and self.channels > 1
        layout = "channels-last" if channels_last else "even" if host.even(self.x.tensor, 3) else "odd"
        return *sizes, self.inputs, self.training, layout, host.precision(self.x.tensor.dtype)

    def unlike_s(self) -> list[tuple[int, int, Maps, Maps | None]]:
        """What the weights w_x see at all steps, as runs of (first step, one past the last, maps, subtracted maps)."""
        if self.inputs == "raw":
            return [(0, self.steps, frames_from(self.x, self.start), None)]
        runs: list[tuple[int, int, Maps, Maps | None]] = []
        if self.start == 0:
            runs.append((0, 1, self.x, self.state_x))
        if self.frames > 1:
            runs.append((1 - self.start, self.steps, frames_from(self.x, 1), self.x))
        return runs


def frames_from(maps: Maps, first: int) -> Maps:
    """The frames from `first` on."""
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
    """Copies of what does not lie as the kernels need it."""
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
