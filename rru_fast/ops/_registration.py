"""What every operator's registration shares."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]

from rru_fast import backends, native, triton


def kernels(op: str, composite: Any) -> dict[str, Any]:
    """What runs operator `op`, by backend: objects with `forward` and `backward`."""
    found = {"composite": composite}
    if native.missing() is None:
        found["cpu"] = native.kernels(op)
    if triton.missing() is None:
        found["triton"] = _Lazy(f"rru_fast.triton.{op}")
    return found


def choose(kernels: dict[str, Any], backend: str, device: torch.device) -> Any:
    """Choose the kernels that serve a call, when it runs: a program may have been exported where others could serve.

    Raises:
        ValueError: `backend` is not "auto", and cannot serve here.
    """
    return kernels[backends.choose(backend, device)]


class _Lazy:
    """A module that is imported when it is first asked for something: importing the library imports no Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels compute in the dtype they chose: autocast reaches into Python implementations too."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def forbid_second_order(op: CustomOpDef, name: str) -> None:
    """Make differentiating the backward operator `op` an error that says so and names the way out."""

    def raise_second_order(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: got a backend whose second-order gradients are not implemented, wanted backend='reference'"
        )

    op.register_autograd(raise_second_order)
