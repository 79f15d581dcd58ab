"""`refine` in two launches per frame forward and four backward, and one for each sum over all frames.

Forward: the part of U that does not depend on S in one launch over all frames; then per frame the transition, which
adds the rest and computes the batch statistics, and the gate, which blends and pools the strips. Backward: the mirror,
in backward_kernels.py. No host synchronization, sums in a fixed order, and all of it can be captured in a CUDA graph.
If the feature maps have 16 bits, S is carried from frame to frame in fp32.
"""

from __future__ import annotations

from torch import Tensor

from rru_fast.arguments import (
    RefineArguments,
    RefineGradients,
    RefineNeed,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
)
from rru_fast.distributed import ranks_of
from rru_fast.triton._autotune import autotune
from rru_fast.triton._device import on_device
from rru_fast.triton._launch import next_power_of_2
from rru_fast.triton._strided import as_strided_maps
from rru_fast.triton.refine import weight_gradients
from rru_fast.triton.refine.arguments import Call
from rru_fast.triton.refine.backward import BackwardPass
from rru_fast.triton.refine.backward import candidates as backward_candidates
from rru_fast.triton.refine.forward import ForwardPass, project_inputs
from rru_fast.triton.refine.forward import candidates as forward_candidates


def forward(args: RefineArguments, save: bool) -> RefineOutputs:
    """Run eq. 1-5 and 9."""
    with on_device(args.x):
        call = Call(args)
        # Tune without collectives: ranks repeat calls a different number of times, and would deadlock.
        config = autotune(
            "refine",
            call.config_key(),
            args.x,
            lambda: forward_candidates(call),
            lambda config: ForwardPass(call, config, save, None).run(),
        )
        ranks = ranks_of(args.process_group, args.elements_per_rank, args.x.device)
        return ForwardPass(call, config, save, ranks).run()


class MotionProjection:
    """W_m M_t of a call with appearance and motion, for kernels that run the rest of its forward."""

    def __init__(self, args: RefineArguments) -> None:
        self._call = Call(args)
        self._config = forward_candidates(self._call).default["input_projection"]  # not worth tuning by itself

    def project(self, u: Tensor, first: int) -> Tensor:
        """Set and return u (F, B, D, P), fp32, for F frames with a gate from `first`; not past the clips' lengths."""
        call = self._call
        n0, n1 = first - call.start, first - call.start + len(u)
        for begin, end, operand in call.input_segments(n0):
            if begin < n1:
                project_inputs(call, self._config, u[begin - n0 : min(end, n1) - n0], operand, call.start + begin)
        return u


def w_gradient(args: RefineArguments, features: Tensor, du: Tensor) -> Tensor:
    """Return the gradient of w, in fp32, from S (B, T, C, H, W) and dU (N, B, D, P), for kernels that run the rest."""
    call = Call(args)
    config = backward_candidates(call).default["dw"]  # not worth tuning by itself
    return weight_gradients.w_gradient(call, config, as_strided_maps(features), du)


def backward(upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> RefineGradients:
    """Run the closed-form backward, from the last frame to the first."""
    with on_device(args.x):
        call = Call(args)
        config = autotune(
            "refine_backward",
            # The number of frames decides into how many parts the weights' gradients are split.
            (*call.config_key(), min(8, next_power_of_2(call.frames)), need.need_x, need.need_weights),
            args.x,
            lambda: backward_candidates(call),
            lambda config: BackwardPass(call, config, upstream, saved, need, None).run(),
        )
        ranks = ranks_of(args.process_group, args.elements_per_rank, args.x.device)
        return BackwardPass(call, config, upstream, saved, need, ranks).run()
