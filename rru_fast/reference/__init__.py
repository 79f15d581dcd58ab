"""Reference in plain PyTorch: the paper's equations, and the modules that `rru_fast.accelerate` replaces."""

from rru_fast.reference.equations import batch_hard_triplet, hardest_distances, refine, strip_pool
from rru_fast.reference.modules import RRU, BatchHardTripletLoss

__all__ = ["RRU", "BatchHardTripletLoss", "batch_hard_triplet", "hardest_distances", "refine", "strip_pool"]
