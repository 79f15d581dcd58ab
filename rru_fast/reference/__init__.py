"""The paper in plain PyTorch: its equations, and the modules that `rru_fast.accelerate` swaps."""

from rru_fast.reference.distributed import gather_batch
from rru_fast.reference.equations import (
    Inputs,
    Metric,
    Reduction,
    Refined,
    State,
    batch_hard_triplet,
    refine,
    strip_pool,
)
from rru_fast.reference.modules import RRU, Attention, BatchHardTripletLoss

__all__ = [
    "RRU",
    "Attention",
    "BatchHardTripletLoss",
    "Inputs",
    "Metric",
    "Reduction",
    "Refined",
    "State",
    "batch_hard_triplet",
    "gather_batch",
    "refine",
    "strip_pool",
]
