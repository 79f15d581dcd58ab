"""Small units of both kinds, this library's and other people's, and maps for them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rru_fast import reference
from tests.helpers import third_party

PEOPLE = torch.arange(12) // 3
SIZES = {"size": 4, "hidden": 8, "spatial_hidden": 5}
# Plain modules from maps (B, T, 6, 4, 4); what accelerate makes of them is under test.
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: reference.RRU(6, (4, 4), hidden=8, spatial_hidden=5),
    "theirs": lambda: third_party.FuseNet(6, 7, **SIZES),
}
every_unit = pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN.keys())


def maps(clips: int, frames: int = 4, **options: Any) -> Tensor:
    return torch.randn(clips, frames, 6, 4, 4, **options)


def first_two(out: Any) -> tuple[Tensor, Tensor]:
    """Features and strips."""
    return out[0], out[1]


def loss_of(out: Any) -> Tensor:
    features, strips = first_two(out)
    return features.float().square().mean() + strips.float().square().mean()


def through_a_file(module: nn.Module) -> nn.Module:
    """The module as another process would load it."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded
