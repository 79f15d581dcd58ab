"""Choice of the operators' implementation: the library's or its plain PyTorch twin."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import rru_fast
import rru_fast.reference

Ops = Literal["fast", "reference"]


def operators(ops: Ops) -> ModuleType:
    """Return the module with `RRU` and `BatchHardTripletLoss`: the library, or its plain PyTorch twins."""
    return {"fast": rru_fast, "reference": rru_fast.reference}[ops]
