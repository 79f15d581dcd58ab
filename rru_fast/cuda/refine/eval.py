"""`refine` in eval mode: one launch over all frames of a video, a clip per cluster of CTAs, its state on chip.

The part of U that does not depend on S is made in segments of frames, to bound its memory: a segment's launch takes
over the state of the one before in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rru_fast.arguments import RefineArguments, RefineOutputs
from rru_fast.cuda.refine.products import MotionProjection, stream_of
from rru_fast.precision import conv_precision
from rru_fast.triton._strided import as_strided_maps

# Scratch of a segment of frames, at least one: the product, or without Triton its operand too, and a convolution's own
# on top. A launch reloads the weights.
SEGMENT_BYTES = 128 * 2**20


class EvalForward:
    """Buffers of a forward pass."""

    def __init__(self, args: RefineArguments, save: bool) -> None:
        self.args, self.save = args, save
        self.x = as_strided_maps(args.x).ptr  # a copy only where positions are not at one stride
        self.state_s = None if args.state_s is None else as_strided_maps(args.state_s[:, None]).ptr[:, 0]
        self.clips, self.frames, self.channels, self.height, self.width = args.x.shape
        self.positions, self.d = self.height * self.width, args.w.shape[0]
        self.num_attn = 0 if args.w_s1 is None else args.w_s1.shape[0]
        self.steps = args.steps
        self.start = self.frames - self.steps  # the first frame with a gate
        self.w_a, self.motion = args.w.contiguous(), None
        if args.inputs == "appearance+motion":
            self.w_a, w_m = self.w_a.chunk(2, 1)
            self.motion = MotionProjection(args, self.x, w_m)
        self.features = args.x.new_empty(args.x.shape)
        self.strips = self.empty(self.clips, self.channels, self.height)
        saved, ragged = self.steps if save else 0, args.lengths is not None
        of_frames = self.zeros if ragged else self.empty  # a clip's kernel stops at its length
        self.u = of_frames(saved, self.clips, self.d, self.positions)
        self.z_s = of_frames(saved if args.w_s1 is not None else 0, self.clips, self.positions)
        self.z_c = of_frames(saved if args.w_c is not None else 0, self.clips, self.channels)
        self.h = of_frames(saved if args.w_s1 is not None else 0, self.clips, self.num_attn)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialized fp32 tensor."""
        return self.args.x.new_empty(shape, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        """Return an fp32 tensor of zeros."""
        return self.args.x.new_zeros(shape, dtype=torch.float32)

    def run(self) -> RefineOutputs:
        """Return the outputs."""
        args, ops = self.args, torch.ops.rru_fast
        precision, stream = conv_precision(args.x.dtype), stream_of(args.x)
        segments = list(self._segments())
        carry = self.empty(self.clips, self.channels, self.positions) if len(segments) > 1 else None
        assert args.running_mean is not None and args.running_var is not None
        packed = ops.refine_cuda_pack(
            self.x,
            self.w_a,
            *(v.contiguous() for v in (args.gamma, args.beta, args.running_mean, args.running_var)),
            *(None if v is None else v.contiguous() for v in (args.w_s1, args.w_s2, args.w_c)),
            args.eps,
            precision,
            stream,
        )
        for first, end in segments:
            ops.refine_cuda_eval(
                self.x,
                packed,
                args.w_c,
                self._project_motion(first, end),
                args.lengths,
                self.state_s,
                self.features,
                self.strips,
                carry,
                [self.u, self.z_s, self.z_c, self.h] if self.save else [],
                self.d,
                self.num_attn,
                precision,
                first,
                end,
                stream,
            )
        frames: Any = self.frames if args.lengths is None else args.lengths[:, None, None].float()
        none = (self.empty(0, args.bn_groups, self.d) for _ in range(2))  # two: outputs may not alias
        mean, var = none
        return RefineOutputs(
            features=self.features,
            strips=(self.strips / (frames * self.width)).to(args.x.dtype),
            mean=mean,
            var=var,
            u=self.u,
            z_s=self.z_s,
            z_c=self.z_c,
            h=self.h,
        )

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Yield the first frame and the end of each segment."""
        if self.motion is None:
            yield 0, self.frames
            return
        rows = self.d if self.motion.is_triton else self.channels
        count = max(1, SEGMENT_BYTES // (4 * self.clips * rows * self.positions))
        for first in range(0, self.frames, count):
            yield first, min(first + count, self.frames)

    def _project_motion(self, first: int, end: int) -> Tensor | None:
        """Return W_m M_t of the frames with a gate, (F, B, D, P); None if there is no motion."""
        if self.motion is None:
            return None
        gated = max(first, self.start)
        shape = max(0, end - gated), self.clips, self.d, self.positions
        u = self.u[gated - self.start : end - self.start] if self.save else self.empty(*shape)
        if len(u) == 0:
            return u
        self.motion.project(u, gated)
        if self.save and self.args.lengths is not None:  # padding may be NaN, which the backward would multiply by zero
            past = torch.arange(gated, end, device=u.device)[:, None] >= self.args.lengths
            u.masked_fill_(past[:, :, None, None], 0)
        return u
