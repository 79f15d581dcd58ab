"""Render small synthetic sets of short tracklets, for tests that need data of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.data.datasets import synthetic


def short_walks(patch: pytest.MonkeyPatch) -> None:
    """Shorten tracklets from 16 to 40 frames to 8 to 12, which suffice for a clip of any recipe."""
    patch.setattr(synthetic, "SHORTEST", 8)
    patch.setattr(synthetic, "LONGEST", 12)


def render(root: Path, people: int, **rates: Any) -> Path:
    """Render people on short walks in the iLIDS-VID layout."""
    with pytest.MonkeyPatch.context() as patch:
        short_walks(patch)
        synthetic.generate(root, people, **rates)
    return root
