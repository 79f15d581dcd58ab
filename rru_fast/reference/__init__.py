"""The paper in plain PyTorch: its equations, and the modules that `rru_fast.accelerate` swaps."""

from rru_fast.reference.equations import batch_hard_triplet, refine, strip_pool
from rru_fast.reference.modules import RRU, BatchHardTripletLoss

__all__ = ["RRU", "BatchHardTripletLoss", "batch_hard_triplet", "refine", "strip_pool"]
