"""One call of `refine` as the launches of both passes see it, and the structures that they hand to the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.arguments import RefineArguments
from rru_fast.precision import conv_precision
from rru_fast.triton._launch import Slices
from rru_fast.triton._precision import acc_dtype
from rru_fast.triton._strided import StridedMaps, StridedMatrix, as_strided_maps, needs_int64, vectorizable


class GateWeights(NamedTuple):
    """Weights of the gate after its transition; those of an attention that the variant lacks are None."""

    gamma: Tensor
    """(D,)."""
    beta: Tensor
    """(D,)."""
    w_s1: Tensor | None
    """(A, P)."""
    w_s2: Tensor | None
    """(P, A)."""
    w_c: Tensor | None
    """(C, D)."""


class Statistics(NamedTuple):
    """Mean and biased variance of the norm: tensors, their slices per frame, or None."""

    mean: Any = None
    var: Any = None


class AttentionVectors(NamedTuple):
    """Attention vectors of one frame, or their gradients: tensors, their slices per frame, or None."""

    h: Any = None
    """(B, A)."""
    z_s: Any = None
    """(B, P)."""
    z_c: Any = None
    """(B, C)."""


class Operand(NamedTuple):
    """Operand of a half of w: x, less a subtrahend unless that is None, frame by frame."""

    x: StridedMaps
    subtracted: StridedMaps | None


class Segment(NamedTuple):
    """Consecutive steps, `first` to `end` (exclusive), whose operands lie at one stride."""

    first: int
    end: int
    operand: Operand


class Call:
    """Arguments of one call with strides, copied where the kernels cannot take their layout, and their sizes."""

    def __init__(self, args: RefineArguments) -> None:
        self.args = args
        self.x = as_strided_maps(args.x)
        self.state_x = None if args.state_x is None else as_strided_maps(args.state_x[:, None])
        self.state_s = None if args.state_s is None else as_strided_maps(args.state_s[:, None])
        self.w = args.w.to(args.x.dtype).contiguous()
        self.gate = GateWeights(
            gamma=args.gamma.contiguous(),
            beta=args.beta.contiguous(),
            w_s1=None if args.w_s1 is None else args.w_s1.contiguous(),
            w_s2=None if args.w_s2 is None else args.w_s2.contiguous(),
            w_c=None if args.w_c is None else args.w_c.contiguous(),
        )
        self.clips, self.frames, self.channels, self.height, self.width = args.x.shape
        self.positions = self.height * self.width
        self.d = self.w.shape[0]
        self.num_attn = 0 if args.w_s1 is None else args.w_s1.shape[0]
        self.steps = args.steps
        self.start = self.frames - self.steps
        """The first frame with a gate."""
        self.groups = args.groups
        self.clips_per_group = self.clips // self.groups
        self.acc_dtype = acc_dtype(args.x.dtype)
        self.keeps_fp32_state = args.x.dtype != self.acc_dtype
        inputs = [maps for maps in (self.x, self.state_x, self.state_s) if maps is not None]
        self.int64_offsets = self.channels * self.positions >= 2**31 or any(map(needs_int64, inputs))
        self.w_recurrent, self.w_input = self.split(self.w)
        # At the first gated frame A = M, since S_1 = X_1: one product with the sum of both halves serves both.
        self.shares_first = args.inputs == "appearance+motion" and self.start == 1 and self.steps > 0
        self.w_first = None
        if self.shares_first and self.w_input is not None:
            self.w_first = _matrix(self.w_recurrent.ptr + self.w_input.ptr)

    def split(self, w: Tensor) -> tuple[StridedMatrix, StridedMatrix | None]:
        """Split w into the columns of the operand that holds S, and of the one that does not."""
        if self.args.inputs == "appearance":
            return _matrix(w), None
        first, second = map(_matrix, w.chunk(2, 1))
        return (second, first) if self.args.inputs == "raw" else (first, second)

    def running_statistics(self) -> Statistics:
        """Return the running statistics, those of one group."""
        mean, var = self.args.running_mean, self.args.running_var
        assert mean is not None and var is not None
        return Statistics(mean.contiguous(), var.contiguous())

    def statistics_slices(self, statistics: Statistics, start: int) -> Statistics:
        """Return the statistics of frame `start + n` at launch n; running ones are the same for every frame."""
        if not self.args.training:
            return statistics
        return Statistics(Slices(statistics.mean, first=start), Slices(statistics.var, first=start))

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialized tensor in the accumulation dtype."""
        return self.args.x.new_empty(shape, dtype=self.acc_dtype)

    def counters(self, count: int) -> Tensor:
        """Return zeros in which programs count arrivals."""
        return self.args.x.new_zeros(count, dtype=torch.int32)

    def config_key(self) -> tuple[Any, ...]:
        """Return all that configs depend on, except for the dtype."""
        sizes = (self.clips, self.channels, self.height, self.width, self.d, self.num_attn, self.groups)
        channels_last = self.x.channel == 1 and self.channels > 1
        layout = "channels-last" if channels_last else "vectorizable" if vectorizable(self.x.ptr, 3) else "other"
        return *sizes, self.args.inputs, self.args.training, layout, conv_precision(self.args.x.dtype)

    def input_segments(self, first_step: int = 0) -> list[Segment]:
        """Return the operands of w_input at the steps from `first_step`."""
        if self.args.inputs == "raw":
            return self._segments(first_step, None, None)
        return self._segments(first_step, self.state_x, self.x)

    def recurrent_segments(self, refined: StridedMaps) -> list[Segment]:
        """Return the operands of w_recurrent at all steps; refined: S."""
        segments = self._segments(0, self.state_s, refined)
        if self.args.inputs == "raw":
            past = [(first, end, operand.subtracted) for first, end, operand in segments]
            return [Segment(first, end, Operand(s, None)) for first, end, s in past if s is not None]
        return segments

    def _segments(self, first_step: int, state: StridedMaps | None, past: StridedMaps | None) -> list[Segment]:
        """Return X_t of each step, less the frame before it, if any: the state's at t = 0, else that of `past`."""
        segments = []
        if self.start == 0 and first_step == 0:
            segments.append(Segment(0, 1, Operand(self.x, state)))
        first = max(first_step, 1 - self.start)
        if first < self.steps:
            t = self.start + first
            subtracted = None if past is None else frames_from(past, t - 1)
            segments.append(Segment(first, self.steps, Operand(frames_from(self.x, t), subtracted)))
        return segments


def one_frame(maps: StridedMaps, t: int) -> StridedMaps:
    """Return frame t alone."""
    return StridedMaps(maps.ptr[:, t], maps.clip, 0, maps.channel, maps.position)


def frame_slices(maps: StridedMaps, start: int) -> StridedMaps:
    """Return frame `start + n` at launch n."""
    return StridedMaps(Slices(maps.ptr, 1, start), maps.clip, 0, maps.channel, maps.position)


def frames_from(maps: StridedMaps, first: int) -> StridedMaps:
    """Return the frames starting with `first`."""
    return maps._replace(ptr=maps.ptr[:, first:])


def _matrix(w: Tensor) -> StridedMatrix:
    return StridedMatrix(w, w.stride(0))
