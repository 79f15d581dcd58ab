"""Code shared by the registrations of the operators."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]

from rru_fast import backends, native, triton


class Kernels(Protocol):
    """A backend's kernels of one operator."""

    forward: Any
    backward: Any


def kernels(op: str, composite: Any, cpu: Any) -> dict[str, Kernels]:
    """Return the kernels of operator `op` by backend.

    Args:
        op: "refine", "strip_pool" or "batch_hard".
        composite: kernels in plain PyTorch, which serve everywhere.
        cpu: kernels in C++, if they have been built.
    """
    found: dict[str, Kernels] = {"composite": composite}
    if native.missing() is None:
        found["cpu"] = cpu
    if triton.missing() is None:
        found["triton"] = _Lazy(f"rru_fast.triton.{op}")
    return found


def choose(kernels: dict[str, Kernels], backend: str, device: torch.device) -> Kernels:
    """Choose the kernels of a call when it runs: the backends may differ from those where a program was exported.

    Raises:
        ValueError: `backend` is not "auto", and cannot serve here.
    """
    return kernels[backends.choose(backend, device)]


class _Lazy:
    """Module imported at its first use, so that `import rru_fast` does not import Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels compute in the dtype they chose; autocast reaches into Python kernels too."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def forbid_second_order(op: CustomOpDef, name: str) -> None:
    """Raise an error that names the backend with second-order gradients when the backward `op` is differentiated."""

    def raise_second_order(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: got a backend whose second-order gradients are not implemented, wanted backend='reference'"
        )

    op.register_autograd(raise_second_order)
