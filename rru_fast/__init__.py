"""Fused operators for video person re-identification with a Refining Recurrent Unit.

`RRU` and `BatchHardTripletLoss` are modules, `refine`, `strip_pool` and `batch_hard_triplet` the functions under them;
`accelerate` swaps them into a model that uses the plain ones of `rru_fast.reference`, and `calibrate` measures which
backend is the fastest on this device.
"""

from rru_fast import reference
from rru_fast.backends import __version__
from rru_fast.calibrate import calibrate
from rru_fast.compat.accelerate import accelerate, restore
from rru_fast.compat.weights import from_official
from rru_fast.functional import batch_hard_triplet, refine, strip_pool
from rru_fast.modules import RRU, BatchHardTripletLoss
from rru_fast.report import show_config
from rru_fast.types import Refined, State

__all__ = [
    "RRU",
    "BatchHardTripletLoss",
    "Refined",
    "State",
    "__version__",
    "accelerate",
    "batch_hard_triplet",
    "calibrate",
    "from_official",
    "reference",
    "refine",
    "restore",
    "show_config",
    "strip_pool",
]
