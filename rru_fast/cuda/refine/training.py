"""`refine` in training mode: one launch forward and one backward over all frames, all clips on the chip at once.

What does not depend on the recurrence is a product over all frames: W_m M_t before the forward, and after the backward
the gradient of w and what reaches X through the motion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.arguments import (
    RefineArguments,
    RefineGradients,
    RefineNeed,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
)
from rru_fast.cuda.refine.products import MotionProjection, add_motion_gradient, stream_of, w_gradient
from rru_fast.precision import conv_precision
from rru_fast.triton._strided import as_strided_maps

# Positions that a thread reads at once: rows of maps have a multiple of them.
TILE = 8


def rows_of(maps: Tensor) -> Tensor:
    """View maps (B, T, C, H, W) as the kernels read them, (B, T, C, R), or copy them.

    R is H W or the next multiple of 8, filled up with zeros; rows are contiguous, at multiples of 16 bytes.
    """
    positions = maps.shape[3] * maps.shape[4]
    if positions % TILE != 0:
        rows = maps.new_zeros((*maps.shape[:3], positions + -positions % TILE))
        rows[..., :positions] = maps.flatten(3)
        return rows
    tensor: Tensor
    tensor, clip, frame, channel, position = as_strided_maps(maps)
    strides = [0 if size == 1 else stride for size, stride in zip(maps.shape, (clip, frame, channel), strict=False)]
    per_16_bytes = 16 // maps.element_size()
    if position != 1 or tensor.data_ptr() % 16 != 0 or any(stride % per_16_bytes for stride in strides):
        return tensor.clone(memory_format=torch.contiguous_format).flatten(3)
    return tensor.as_strided((*maps.shape[:3], positions), (*strides, 1))


class _Pass:
    """Sizes and weights of one call."""

    def __init__(self, args: RefineArguments) -> None:
        self.args, self.precision, self.stream = args, conv_precision(args.x.dtype), stream_of(args.x)
        self.clips, self.frames, self.channels, self.height, self.width = args.x.shape
        self.positions, self.steps = self.height * self.width, args.steps
        self.x = rows_of(args.x)
        self.w_a, self.w_m = args.w.contiguous(), None
        if args.inputs == "appearance+motion":
            self.w_a, self.w_m = self.w_a.chunk(2, 1)

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """W_a and the rest, as the kernels take them."""
        args = self.args
        rest = (args.gamma, args.beta, args.w_s1, args.w_s2, args.w_c)
        return self.w_a, *(None if v is None else v.contiguous() for v in rest)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialized fp32 tensor."""
        return self.args.x.new_empty(shape, dtype=torch.float32)

    def empty_maps(self) -> tuple[Tensor, Tensor]:
        """Return maps like x, and their rows: the same memory, unless rows have more elements."""
        maps = self.args.x.new_empty(self.args.x.shape)
        if self.positions == self.x.shape[3]:
            return maps, maps.flatten(3)
        return maps, self.args.x.new_empty(self.x.shape)

    def fill(self, maps: Tensor, rows: Tensor) -> None:
        """Set maps to their rows, if these are elsewhere."""
        if self.positions != self.x.shape[3]:
            maps.flatten(3).copy_(rows[..., : self.positions])


class TrainingForward(_Pass):
    """A forward pass."""

    def __init__(self, args: RefineArguments, save: bool) -> None:
        super().__init__(args)
        self.save = save

    def run(self) -> RefineOutputs:
        """Return the outputs."""
        args, d, saved = self.args, self.args.w.shape[0], self.steps if self.save else 0
        num_attn = 0 if args.w_s1 is None else args.w_s1.shape[0]
        features, feature_rows = self.empty_maps()
        strips = self.empty(self.clips, self.channels, self.height)
        # Zeros of the first frame, whose gate reads zeros.
        mean, var = (args.x.new_zeros((self.frames, args.bn_groups, d), dtype=torch.float32) for _ in range(2))
        u = self.empty(self.steps if self.save or self.w_m is not None else 0, self.clips, d, self.positions)
        if self.w_m is not None and self.steps > 0:
            MotionProjection(args, as_strided_maps(args.x).ptr, self.w_m).project(u, 1)
        z_s = self.empty(saved if args.w_s1 is not None else 0, self.clips, self.positions)
        z_c = self.empty(saved if args.w_c is not None else 0, self.clips, self.channels)
        h = self.empty(saved if args.w_s1 is not None else 0, self.clips, num_attn)
        torch.ops.rru_fast.refine_cuda_forward(
            self.x,
            *self.weights,
            args.eps,
            args.bn_groups,
            self.precision,
            self.height,
            self.width,
            self.w_m is not None,
            feature_rows,
            strips,
            mean,
            var,
            u if self.save or self.w_m is not None else None,
            [z_s, z_c, h] if self.save else [],
            self.stream,
        )
        self.fill(features, feature_rows)
        return RefineOutputs(
            features=features,
            strips=(strips / (self.frames * self.width)).to(args.x.dtype),
            mean=mean,
            var=var,
            u=u if self.save else self.empty(0, self.clips, d, self.positions),
            z_s=z_s,
            z_c=z_c,
            h=h,
        )


class TrainingBackward(_Pass):
    """A backward pass."""

    def __init__(self, upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> None:
        super().__init__(args)
        self.upstream, self.saved, self.need = upstream, saved, need

    def run(self) -> RefineGradients:
        """Return the gradients."""
        args, saved, (d_features, d_strips) = self.args, self.saved, (self.upstream.d_features, self.upstream.d_strips)
        if d_strips is not None:
            d_strips = (d_strips.float() / (self.frames * self.width)).contiguous()
        d_x, d_x_rows = self.empty_maps() if self.need.need_x else (None, None)
        du = self.empty(self.steps, self.clips, args.w.shape[0], self.positions)
        sums, d_z_s, d_z_c, d_h, y_channels, y_positions = torch.ops.rru_fast.refine_cuda_backward(
            None if d_features is None else rows_of(d_features),
            d_strips,
            self.x,
            rows_of(saved.features),
            *(saved.mean, saved.var, saved.u, saved.z_s, saved.z_c, saved.h),
            *self.weights,
            args.eps,
            args.bn_groups,
            self.precision,
            self.height,
            self.width,
            d_x_rows,
            du,
            self.need.need_weights,
            self.stream,
        )
        if d_x is not None and d_x_rows is not None:
            self.fill(d_x, d_x_rows)
            if self.w_m is not None and self.steps > 0:
                add_motion_gradient(d_x.flatten(3), du, self.w_m.to(d_x.dtype))
        if not self.need.need_weights:
            return RefineGradients(x=d_x)
        d_beta, d_gamma = (sums[:, :, : args.w.shape[0], i].sum((0, 1)) for i in range(2))
        pooled = y_positions.sum(2) / args.w.shape[0]
        spatial, channel = args.w_s1 is not None, args.w_c is not None
        gradients = args.cast_to_weight_dtypes(
            w=w_gradient(args, saved.features, du),
            gamma=d_gamma,
            beta=d_beta,
            w_s1=_outer(d_h, pooled) if spatial else None,
            w_s2=_outer(d_z_s, saved.h) if spatial else None,
            w_c=_outer(d_z_c, y_channels) if channel else None,
        )
        return RefineGradients(x=d_x, **gradients)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b, (M, K), of a (N, B, M) and b (N, B, K), summed over steps and clips."""
    return a.flatten(0, 1).t() @ b.flatten(0, 1)
