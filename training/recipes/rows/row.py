"""What a row of the paper's tables is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One network of the paper's tables, and how well it did there.

    name: the paper's.
    changes: what the row makes of a recipe, by the recipe's fields.
    paper: its figures in percent by dataset: rank-1, rank-5, rank-20, and for MARS mAP before them.
    """

    name: str
    changes: Mapping[str, Any]
    paper: Mapping[str, tuple[float, ...]]
