"""Rendered people on short walks: what most tests train on is to be there, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.data.datasets import synthetic


def short_walks(patch: pytest.MonkeyPatch) -> None:
    """Have each camera see a person for 8 to 12 frames, which are a clip of any recipe, and not for 16 to 40."""
    patch.setattr(synthetic, "SHORTEST", 8)
    patch.setattr(synthetic, "LONGEST", 12)


def render(root: Path, people: int, **rates: Any) -> Path:
    """Render people on short walks in the iLIDS-VID layout."""
    with pytest.MonkeyPatch.context() as patch:
        short_walks(patch)
        synthetic.generate(root, people, **rates)
    return root
