"""Registration of the operators with PyTorch's dispatcher."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from rru_fast import backends, cuda, native, triton
from rru_fast.auto import choice
from rru_fast.auto.kinds import KINDS, Key
from rru_fast.ops import _autograd

LIBRARY: Any = torch.library.Library("rru_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


class FallbackWarning(UserWarning):
    """The backend that a call names does not carry it; another one runs it."""


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
    if cuda.missing() is None and cuda.not_carried(op) is None:
        found["cuda"] = _Lazy(f"rru_fast.cuda.{op}")
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
    if name == "cuda":
        chosen: Kernels = _Cuda(op, kernels, cuda.fallback(device))
    elif name in kernels:
        backends.note_run(op, name)
        chosen = kernels[name]
    else:  # past the public functions
        wanted = ", ".join(map(repr, kernels))
        raise ValueError(f"backend: got {backend!r} for an operator's kernels in Python, wanted one of {wanted}")
    return _Untuned(chosen) if backend.startswith(backends.CHOSEN) else chosen


class _Lazy:
    """Module imported at its first use, so that `import rru_fast` does not import Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


class _Cuda:
    """CUDA kernels where they carry a call, and another backend's where they do not."""

    def __init__(self, op: str, kernels: dict[str, Kernels], fallback: str) -> None:
        self._op, self._kernels, self._fallback = op, kernels, fallback

    def forward(self, args: Any, *rest: Any) -> Any:
        own: Any = self._kernels.get("cuda")
        why = cuda.not_carried(self._op) if own is None else own.not_carried(args)
        return self._choose(why, warn=True).forward(args, *rest)

    def backward(self, *args: Any) -> Any:
        own: Any = self._kernels.get("cuda")
        if own is None:  # the forward has warned
            return self._run(self._fallback).backward(*args)
        _upstream, _saved, call, _need = args
        # In training the forward has warned, in the same words; of eval mode the documentation says it.
        return self._choose(own.not_carried(call, backward=True), warn=call.training).backward(*args)

    def _choose(self, why: str | None, warn: bool) -> Kernels:
        """Return the kernels of a call that is not carried for a reason, or is."""
        if why is None:
            return self._run("cuda")
        if warn:
            _warn_once(f"rru_fast.{self._op}: backend='cuda' runs {self._fallback} for what it does not carry: {why}")
        return self._run(self._fallback)

    def _run(self, backend: str) -> Kernels:
        backends.note_run(self._op, backend)
        return self._kernels[backend]


@cache
def _warn_once(message: str) -> None:
    """Warn at the line that called the library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rru_fast", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FallbackWarning, stacklevel=level)


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
        if importlib.util.find_spec("triton") is None:  # the CUDA kernels may be here without it
            return nullcontext()
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
