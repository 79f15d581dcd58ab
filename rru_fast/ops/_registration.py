"""Registration of the operators with PyTorch's dispatcher."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from rru_fast import backends, native, triton
from rru_fast.auto import choice
from rru_fast.auto.kinds import KINDS, Key
from rru_fast.ops import _autograd

LIBRARY: Any = torch.library.Library("rru_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


class Kernels(Protocol):
    """A backend's kernels of one operator."""

    @property
    def forward(self) -> Any: ...

    @property
    def backward(self) -> Any: ...


def kernels(op: str, composite: Any) -> dict[str, Kernels]:
    """Return the kernels of operator `op` that are called from Python, by backend; those in C++ are in csrc/ops.

    Args:
        op: "refine", "strip_pool" or "batch_hard".
        composite: kernels in plain PyTorch, which serve everywhere.
    """
    found: dict[str, Kernels] = {"composite": composite}
    if triton.missing() is None:
        found["triton"] = _Lazy(f"rru_fast.triton.{op}")
    return found


def choose(op: str, kernels: dict[str, Kernels], backend: str, device: torch.device, key: Callable[[], Key]) -> Kernels:
    """Choose the kernels of a call when it runs: the backends may differ from those where a program was exported.

    Args:
        op: the operator's name.
        kernels: by backend.
        backend: as the caller passed it.
        device: of the tensors.
        key: returns the key of the call, that of its forward in its backward.

    Raises:
        ValueError: `backend` is not "auto", and cannot serve here.
    """
    if backend == "auto":
        backend = choice.recorded(key(), KINDS[op].from_key)
    name = backends.choose(backend, device)
    if name not in kernels:  # past the public functions
        wanted = ", ".join(map(repr, kernels))
        raise ValueError(f"backend: got {backend!r} for an operator's kernels in Python, wanted one of {wanted}")
    backends.note_run(op, name)
    if backend.startswith(backends.CHOSEN):
        return _Untuned(kernels[name])
    return kernels[name]


class _Lazy:
    """Module imported at its first use, so that `import rru_fast` does not import Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


class _Untuned:
    """Kernels of Triton with the configs that there are: nothing is tried out in a process that asked for "auto"."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def forward(self, *args: Any) -> Any:
        with self._without_tuning():
            return self._kernels.forward(*args)

    def backward(self, *args: Any) -> Any:
        with self._without_tuning():
            return self._kernels.backward(*args)

    @staticmethod
    def _without_tuning() -> AbstractContextManager[None]:
        autotune: Any = importlib.import_module("rru_fast.triton._autotune")
        context: AbstractContextManager[None] = autotune.without_tuning()
        return context


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels compute in the dtype they chose; autocast reaches into Python kernels too."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def register(name: str, forward: str, backward: str, functions: tuple[Callable[..., Any], ...]) -> tuple[Any, Any]:
    """Register an operator and its backward, and return both.

    Args:
        name: of the operator; its backward is `name`_backward.
        forward, backward: their schemas, without names. `_autograd.differentiate` tells what their arguments' names
            mean.
        functions: forward and backward in Python, then their fake implementations.
    """
    names = name, f"{name}_backward"
    for op, schema, function, fake in zip(names, (forward, backward), functions[:2], functions[2:], strict=True):
        LIBRARY.define(f"{op}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(op, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rru_fast::{op}", fake, lib=LIBRARY)
        if native.missing() is None:  # csrc/ops serves tensors on a CPU, and calls this for other backends
            LIBRARY.define(f"{op}_python{schema}")
            LIBRARY.impl(f"{op}_python", function, "CompositeExplicitAutograd")
    if native.missing() is not None:
        _autograd.differentiate(LIBRARY, name)
    return tuple(getattr(torch.ops.rru_fast, op).default for op in names)  # type: ignore[return-value]
