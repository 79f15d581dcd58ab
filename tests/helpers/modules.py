"""Small plain modules, of the reference and third-party, that accelerate swaps, and clips for them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rru_fast import reference
from rru_fast.compat import binding
from tests.helpers import third_party

PEOPLE = torch.arange(12) // 3
SIZES = {"size": 4, "hidden": 8, "spatial_hidden": 5}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "reference": lambda: reference.RRU(6, (4, 4), hidden=8, spatial_hidden=5),
    "third-party": lambda: third_party.FuseNet(6, 7, **SIZES),
}
# Labels of other dtypes, signs and strides that tell the same identities apart; "bool" two groups of them.
LABEL_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "int32": lambda y: y.int(),
    "uint8": lambda y: y.byte(),
    "negative": lambda y: y - 1000,
    "float": lambda y: y / 10,
    "bool": lambda y: y > 2,
    "strided": lambda y: torch.stack((y, y), 1)[:, 0],
}
every_unit = pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN.keys())


def maps(clips: int, frames: int = 4, **options: Any) -> Tensor:
    """Random clips (B, T, 6, 4, 4)."""
    return torch.randn(clips, frames, 6, 4, 4, **options)


def first_two(out: Any) -> tuple[Tensor, Tensor]:
    """Features and strips."""
    return out[0], out[1]


def loss_of(out: Any) -> Tensor:
    features, strips = first_two(out)
    return features.float().square().mean() + strips.float().square().mean()


def through_a_file(module: nn.Module) -> nn.Module:
    """Save the module and load it as another process would."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@contextmanager
def warnings_as(action: Any) -> Iterator[None]:
    """Raise warnings as errors, or ignore them, by a name of the warnings filter."""
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield


def bound_backend(obj: object) -> str | None:
    """The backend of the fast forward that accelerate bound to a third-party object; None without one."""
    return binding.bound(obj).args[1] if binding.is_bound(obj) and binding.bound(obj) is not None else None
