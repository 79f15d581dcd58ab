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
    values,
)


def forward(args: RefineArguments, save: bool) -> RefineOutputs:
    """Run eq. 1-5 and 9."""
    return RefineOutputs(*torch.ops.rru_fast.refine_cpu.default(*values(args), save))


def backward(upstream: RefineUpstream, saved: RefineSaved, args: RefineArguments, need: RefineNeed) -> RefineGradients:
    """Run the closed-form backward; gradients that are not needed are empty."""
    flat = (*values(upstream), *values(saved), *values(args), *values(need))
    return RefineGradients(*torch.ops.rru_fast.refine_backward_cpu.default(*flat))
