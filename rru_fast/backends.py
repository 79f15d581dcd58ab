"""Available backends, the default of each device, reasons why others are not available, and which have run."""

from __future__ import annotations

from typing import Any

import torch

from rru_fast import cuda, native, triton

__version__ = "0.1.0"

# Reason why a backend is not available; None if it is. From the oracle to the lowest-level kernels.
BACKENDS: dict[str, str | None] = {
    "reference": None,
    "composite": None,
    "cpu": native.missing(),
    "triton": triton.missing(),
    "cuda": cuda.missing(),
}

OPERATORS = ("refine", "strip_pool", "batch_hard")
_run: dict[str, set[str]] = {op: set() for op in OPERATORS}


CHOSEN = "auto:"
"""Prefix of a backend that `auto` has chosen: its kernels are not tuned in this process."""


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or an available backend."""
    if isinstance(backend, str) and (backend == "auto" or BACKENDS.get(backend.removeprefix(CHOSEN), "") is None):
        return
    usable = ", ".join(repr(name) for name, reason in BACKENDS.items() if reason is None)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {usable}")
    raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {usable}: {BACKENDS[backend]}")


def choose(backend: str, device: torch.device) -> str:
    """Return the backend that runs a call with argument `backend` and tensors on `device`.

    For "auto" that is the default of the device: `rru_fast.auto` knows what has been measured to be faster.
    """
    check_backend(backend)
    if backend == "auto":
        return "cpu" if device.type == "cpu" and BACKENDS["cpu"] is None else "composite"
    backend = backend.removeprefix(CHOSEN)
    if not _serves(backend, device):
        on = {"cpu": "the CPU", "triton": _gpu(triton.CAPABILITY), "cuda": _gpu(cuda.CAPABILITY)}[backend]
        raise ValueError(f"backend: got {backend!r} with tensors on {device}, wanted 'auto', or tensors on {on}")
    return backend


def _gpu(capability: tuple[int, int]) -> str:
    return "an NVIDIA GPU of compute capability {}.{} or newer".format(*capability)


def _serves(backend: str, device: torch.device) -> bool:
    """Return True if an available backend runs on `device`."""
    if backend == "cpu":
        return device.type == "cpu"
    if backend == "cuda":
        return cuda.serves(device)
    return triton.serves(device) if backend == "triton" else True


def serving(device: torch.device, op: str | None = None, **call: Any) -> list[str]:
    """List the backends that can run on `device`, the reference first.

    Args:
        device: of the tensors.
        op: an operator: list only backends whose own kernels run it, not those that leave it to another.
        call: what is known of the call, as `rru_fast.cuda.not_carried` takes it.
    """
    found = [name for name, why in BACKENDS.items() if why is None and _serves(name, device)]
    return [name for name in found if op is None or name != "cuda" or cuda.not_carried(op, **call) is None]


def note_run(op: str, backend: str) -> None:
    """Note that a backend has run an operator; the C++ kernels note it themselves."""
    _run[op].add(backend)


def ran() -> dict[str, list[str]]:
    """Return the backends that have run each operator in this process, since `forget_runs`, by the operator's name.

    >>> import rru_fast, torch
    >>> _ = rru_fast.strip_pool(torch.zeros(1, 1, 1, 1, 1), backend="composite")
    >>> "composite" in ran()["strip_pool"]
    True
    """
    noted = {op: set(names) for op, names in _run.items()}
    for op in native.ran():
        noted[op].add("cpu")
    return {op: [name for name in BACKENDS if name in names] for op, names in noted.items() if names}


def forget_runs() -> None:
    """Have `ran` begin anew."""
    for noted in _run.values():
        noted.clear()
    native.forget_runs()
