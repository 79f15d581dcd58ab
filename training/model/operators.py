"""Which implementation of the paper's operators a network is built from."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import rru_fast
import rru_fast.reference

Ops = Literal["fast", "reference"]


def operators(ops: Ops) -> ModuleType:
    """The module that holds `RRU` and `BatchHardTripletLoss`: the library's kernels or their plain PyTorch twins."""
    return {"fast": rru_fast, "reference": rru_fast.reference}[ops]
