"""Products of `refine` outside of its kernels, over all frames at once: by Triton where that serves, else by PyTorch.

Triton's kernels form their operands on load; PyTorch's are in the precision of the convolution that `refine` replaces.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast import cuda
from rru_fast.arguments import RefineArguments
from rru_fast.precision import conv_precision, convolutions_in

# Scratch of the gradient that reaches X through the motion, at least that of one clip.
MOTION_GRADIENT_BYTES = 64 * 2**20


def stream_of(x: Tensor) -> int:
    """Return the handle of the current stream, 0 on a CPU."""
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else 0


def _by_triton(x: Tensor) -> bool:
    return cuda.fallback(x.device) == "triton"


def _convolutions(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context for convolutions in the precision of a call's fp32 products; 16-bit ones have no other."""
    return convolutions_in(conv_precision(dtype)) if dtype == torch.float32 else nullcontext()


class MotionProjection:
    """W_m M_t, the part of U that does not depend on S."""

    def __init__(self, args: RefineArguments, x: Tensor, w_m: Tensor) -> None:
        """x: (B, T, C, H, W), positions at one stride; w_m: (D, C)."""
        self.args, self.x, self.w_m = args, x, w_m
        self.is_triton = _by_triton(args.x)
        self._triton: Any = None
        if self.is_triton:
            from rru_fast.triton.refine import MotionProjection as TritonProjection

            self._triton = TritonProjection(args)

    def project(self, u: Tensor, first: int) -> None:
        """Set u (F, B, D, P), fp32, for F frames with a gate from `first`."""
        if self._triton is not None:
            self._triton.project(u, first)
            return
        args, end = self.args, first + len(u)
        x = self.x.flatten(3)
        clips, _, channels, positions = x.shape
        motion = x.new_empty((clips, len(u), channels, positions), dtype=torch.float32)
        motion.copy_(x[:, first:end])  # subtracted in fp32
        if first > 0:
            motion -= x[:, first - 1 : end - 1]
        else:
            assert args.state_x is not None
            motion[:, 1:] -= x[:, : end - 1]
            motion[:, 0] -= args.state_x.flatten(2)
        with _convolutions(x.dtype):
            projected = F.conv1d(motion.flatten(0, 1), self.w_m.float()[:, :, None])
        u.copy_(projected.view(clips, len(u), -1, positions).transpose(0, 1))


def add_motion_gradient(d_x: Tensor, du: Tensor, w_m: Tensor) -> None:
    """Add W_m^T (dU_t - dU_{t+1}), what reaches X_t through the motion, to d_x (B, T, C, P), contiguous.

    du: (T - 1, B, D, P), fp32, of the frames from the second; w_m: (D, C), in d_x's dtype.
    """
    clips, frames, channels, positions = d_x.shape
    of_clip = 4 * frames * max(channels, len(w_m)) * positions
    at_once = max(1, MOTION_GRADIENT_BYTES // of_clip)
    for first in range(0, clips, at_once):
        own = d_x[first : first + at_once]
        own_du = du[:, first : first + at_once].transpose(0, 1)
        difference = du.new_zeros((len(own), frames, len(w_m), positions))
        difference[:, 1:] += own_du
        difference[:, :-1] -= own_du
        to, operand = own.view(-1, channels, positions), difference.flatten(0, 1)
        if d_x.dtype == torch.bfloat16 or (not d_x.is_cuda and d_x.dtype == torch.float32):
            to.baddbmm_(w_m.t().expand(len(to), -1, -1), operand.to(d_x.dtype))
        else:  # in fp16 gradients could overflow
            with _convolutions(d_x.dtype):
                to += F.conv1d(operand, w_m.t().float()[:, :, None])


def w_gradient(args: RefineArguments, features: Tensor, du: Tensor) -> Tensor:
    """Return the gradient of w, (D, C) or (D, 2C) in fp32, from S and dU (N, B, D, P)."""
    if _by_triton(args.x):
        from rru_fast.triton.refine import w_gradient as triton_w_gradient

        return triton_w_gradient(args, features, du)
    from rru_fast.composite._products import Products

    products = Products(args.x)
    x, s = args.x.flatten(3), features.flatten(3)
    d_w_t = du.new_zeros((args.w.shape[1], args.w.shape[0]))
    halves = d_w_t.chunk(2) if args.inputs == "appearance+motion" else (d_w_t,)
    with _convolutions(x.dtype):
        for n, own_du in enumerate(du):
            current = x[:, n + 1].float()
            for half, subtracted in zip(halves, (s[:, n], x[:, n]), strict=False):
                products.add_outer(half, current - subtracted, own_du)
    return d_w_t.t().contiguous()
