"""`refine` in C++: csrc/cpu/refine.cpp and refine_backward.cpp."""

from __future__ import annotations

import torch

from rru_fast.arguments import (
    RefineArguments,
    RefineGradients,
    RefineNeed,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
)


def forward(args: RefineArguments, save: bool) -> RefineOutputs:
    """Run eq. 1-5 and 9."""
    return RefineOutputs(*torch.ops.rru_fast.refine_cpu.default(**vars(args), save=save))


def backward(upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> RefineGradients:
    """Run the closed-form backward."""
    arguments = vars(upstream) | vars(saved) | vars(args) | vars(need)
    gradients = torch.ops.rru_fast.refine_backward_cpu.default(**arguments)  # empty where there is none
    return RefineGradients(*(gradient if gradient.numel() > 0 else None for gradient in gradients))
