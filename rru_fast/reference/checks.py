"""Argument checks of the reference: every message names the argument, what it got and what it wanted."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GroupMember, ProcessGroup

FINITE = sys.float_info.max
SMALLEST = sys.float_info.min


def check_dense(name: str, tensor: Any, meaning: str) -> None:
    """Raise unless it is a tensor, and neither nested nor sparse."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a tensor {meaning}")
    if tensor.is_nested:
        raise TypeError(f"{name}: got a nested tensor, wanted a dense tensor {meaning}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, wanted a dense tensor {meaning}")


def check_process_group(process_group: Any, bn_groups: int) -> None:
    """Raise unless the process group, if any, is one that this rank is in and whose clips are a single group."""
    if process_group is None:
        return
    if not isinstance(process_group, ProcessGroup):
        outside = isinstance(process_group, int) and process_group == GroupMember.NON_GROUP_MEMBER
        got = "one that this rank is not in" if outside else repr(process_group)
        raise TypeError(f"process_group: got {got}, wanted a torch.distributed.ProcessGroup of this rank's, or None")
    if bn_groups != 1:
        raise ValueError(f"bn_groups: got {bn_groups} with a process_group, wanted 1: statistics are of all clips")


def check_sizes(**sizes: Any) -> None:
    """Raise ValueError unless every named value is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: got {size!r}, wanted an integer of at least 1")


def check_number(name: str, value: Any, least: float, most: float, wanted: str) -> None:
    """Raise ValueError unless the value is a number from `least` to `most`, both included; NaN is not."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not least <= number <= most:
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")


def check_loss(margin: Any, metric: Any) -> None:
    """Raise ValueError unless the margin is a finite number or "soft", and the metric one there is."""
    if not (isinstance(margin, str) and margin == "soft"):
        check_number("margin", margin, -FINITE, FINITE, "a finite number or 'soft'")
    if not isinstance(metric, str) or metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: got {metric!r}, wanted one of 'euclidean', 'cosine'")


def check_layer(name: str, layer: Any, kind: type[nn.Module]) -> None:
    """Only that is read of a layer which its kind has."""
    own = None if "forward" in vars(layer) else type(layer).forward
    if own is not kind.forward or getattr(layer, "bias", None) is not None:
        got = type(layer).__name__
        wanted = f"a {kind.__name__}" + " without bias" * (kind is not nn.ReLU)
        raise TypeError(f"{name}: got {got}, wanted {wanted}: its weight is read, its forward not called")


def check_backend(backend: Any) -> None:
    """Raise ValueError unless the backend is the one that the reference's modules have."""
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or 'reference' (this is the reference module)")
