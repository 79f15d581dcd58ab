"""`batch_hard_triplet` in C++: csrc/cpu/batch_hard.cpp and batch_hard_backward.cpp."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rru_fast.arguments import BatchHardArguments, BatchHardOutputs, BatchHardSaved


def forward(args: BatchHardArguments) -> BatchHardOutputs:
    """Find each anchor's hardest positive and negative, and its loss."""
    return BatchHardOutputs(*torch.ops.rru_fast.batch_hard_cpu.default(**vars(args)))


def backward(d_loss: Tensor, saved: BatchHardSaved, args: BatchHardArguments) -> Tensor:
    """Return the gradient of the features, (G, N, D)."""
    arguments = {"d_loss": d_loss} | vars(saved) | vars(args)
    return cast(Tensor, torch.ops.rru_fast.batch_hard_backward_cpu.default(**arguments))
