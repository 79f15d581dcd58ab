"""`refine` in one launch over all frames, forward and backward: a clip per cluster of CTAs, its state on chip."""

from __future__ import annotations

import torch

from rru_fast import cuda
from rru_fast.arguments import (
    RefineArguments,
    RefineGradients,
    RefineNeed,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
)
from rru_fast.cuda.refine.eval import EvalForward
from rru_fast.cuda.refine.training import TrainingBackward, TrainingForward
from rru_fast.precision import conv_precision
from rru_fast.triton._device import on_device


def not_carried(args: RefineArguments, backward: bool = False) -> str | None:
    """Return the reason if the kernels do not carry a call's forward, or its backward, else None."""
    _, _, channels, height, width = args.x.shape
    num_attn = 0 if args.w_s1 is None else args.w_s1.shape[0]
    dtype = str(args.x.dtype).removeprefix("torch.")
    sizes = channels, height * width, args.w.shape[0], num_attn
    precision = conv_precision(args.x.dtype)
    why = cuda.not_carried("refine", dtype, args.inputs, args.training, precision, *sizes)
    if why is None and args.process_group:
        why = "batch statistics of several ranks"
    if why is None and backward and not args.training:
        why = "the backward in eval mode"
    if why is not None:
        return why
    # Asks the GPU whether it can hold the clusters.
    ops, sizes_of_gate = torch.ops.rru_fast, (args.w.shape[0], num_attn, args.w_c)
    with on_device(args.x):
        if args.training:
            lacks, _ = ops.refine_cuda_training_plan(args.x, *sizes_of_gate, args.bn_groups, precision, backward)
        else:
            lacks, _ = ops.refine_cuda_plan(args.x, *sizes_of_gate, precision)
    return lacks or None


def forward(args: RefineArguments, save: bool) -> RefineOutputs:
    """Run eq. 1-5 and 9."""
    with on_device(args.x):
        return (TrainingForward if args.training else EvalForward)(args, save).run()


def backward(upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> RefineGradients:
    """Run the closed-form backward in training mode, from the last frame to the first."""
    with on_device(args.x):
        return TrainingBackward(upstream, saved, args, need).run()
