"""Measure which backend is the fastest on this device, and have `auto` run it: `python -m rru_fast.calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rru_fast.auto import choice, spawn
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import Kind

__all__ = ["calibrate"]


def calibrate(
    function: Callable[..., object], *args: Any, again: bool = False, seconds: float = spawn.SECONDS, **kwargs: Any
) -> dict[Kind, Decision]:
    """Measure all kinds of calls that a module or function makes with backend="auto", before training starts.

    Calls function(*args, **kwargs) once to see which operators it calls, in which shapes, dtypes and layouts, in
    training or in eval mode, with gradients or without, and as CUDA graphs or not. Each kind is then measured on its
    tensors' device by a process of its own: backends that compute the float64 oracle's results are timed. Decisions are
    kept on disk, one per kind and device; `rru_fast.show_config` lists them. A kind is its call with B and T, or G, N
    and M, rounded up to powers of 2.

    Unlike the first call of a kind on a GPU, which does the same for one kind, it calibrates on a CPU too, any number
    of kinds, and under torch.distributed: call it on one rank, before the others start.

    Args:
        function: an `nn.Module`, whose buffers are restored after the call, or any other callable.
        args, kwargs: its arguments, as in training. Gradients are not computed, but kinds have them as the call does.
        again: measure kinds again that have been decided.
        seconds: time limit of each kind; a process that takes longer is killed, and the default serves.

    Returns:
        The decision on each kind, in order of the calls. `backend` runs from now on, and `reason` says why.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: the call reached no operator of this library with backend="auto".

    >>> import torch, rru_fast
    >>> found = rru_fast.calibrate(rru_fast.RRU(4, spatial=(2, 2), hidden=2), torch.rand(2, 3, 4, 2, 2))
    >>> [(kind.op, decision.backend in ("cpu", "composite")) for kind, decision in found.items()]
    [('refine', True)]
    """
    if not callable(function):
        raise ValueError(f"function: got {type(function).__name__}, wanted a module or another callable")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"seconds: got {seconds!r}, wanted a number above 0")
    with _restored(function), choice.collecting() as kinds:
        function(*args, **kwargs)
    if not kinds:
        raise RuntimeError(
            'function: got a call that reached no operator of rru_fast with backend="auto", wanted one that does, '
            "outside of torch.compile"
        )
    return {kind: choice.calibrate(kind, device, again=again, seconds=seconds) for kind, device in kinds.items()}


@contextmanager
def _restored(function: Callable[..., object]) -> Iterator[None]:
    """Restore a module's buffers and the state of random numbers afterwards."""
    modules = list(function.modules()) if isinstance(function, nn.Module) else []
    before = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in before:
                    module._buffers[name] = buffer  # the module may hold another one now
                    buffer.copy_(value)
