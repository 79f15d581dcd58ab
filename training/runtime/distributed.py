"""Processes of a run, started by torchrun: rank, collectives, and what the others do when one of them fails.

Without torchrun there is one process and no process group; every function then returns at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")

# Seconds for torchrun to send SIGTERM after a process has failed; by default it polls them ten times a second.
_SIGTERM_DELAY = 10.0

_resume_hint: Callable[[], str] | None = None


class RunEnded(BaseException):
    """SIGTERM from torchrun: another process of the run has failed, or torchrun itself is to end."""

    def __str__(self) -> str:
        return "a process of the run has ended, and all with it" + (f"; {_resume_hint()}" if _resume_hint else "")


def set_resume_hint(hint: Callable[[], str]) -> None:
    """Have a `RunEnded` say how to continue.

    Args:
        hint: called when the run ends; returns the text.
    """
    global _resume_hint
    _resume_hint = hint


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True in the process that writes files and the terminal."""
    return rank() == 0


@contextmanager
def processes() -> Iterator[None]:
    """Join the process group of torchrun for the block: gloo for CPU tensors, NCCL for those of GPUs.

    Raises:
        RunEnded: in the block, when torchrun ends this process as another one has failed.
        KeyboardInterrupt: in the block, on SIGINT.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        yield
        wait_for_all()
    except RuntimeError:
        # A collective raises as soon as a peer is gone, before torchrun has noticed and sent SIGTERM. The peer's
        # failure is the one to report; a RuntimeError without SIGTERM is this process's own.
        time.sleep(_SIGTERM_DELAY)
        raise
    finally:
        _ignore_signals()
    dist.destroy_process_group()


def first_to_report() -> bool:
    """Return True in the first process that calls this: it alone reports why the run ends."""
    if not dist.is_torchelastic_launched():
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, timeout=timedelta(seconds=_SIGTERM_DELAY))  # torchrun's, of this attempt
        return store.add("reports", 1) == 1
    except dist.DistError:  # torchrun is gone
        return is_main()


def from_main(function: Callable[[], T]) -> T:
    """Call a function in the main process alone; return its value in every process."""
    if world() == 1:
        return function()
    values = [function() if is_main() else None]
    dist.broadcast_object_list(values)
    return cast(T, values[0])


def main_first(function: Callable[[], T]) -> T:
    """Call a function in the main process, then in the others; return this process's value."""
    if is_main():
        value = function()
        wait_for_all()
        return value
    wait_for_all()
    return function()


def gathered(value: T) -> list[T]:
    """Values of all processes, in order of rank."""
    values: list[T | None] = [None] * world()
    if world() == 1:
        return [value]
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, without gradients; return it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Block until every process has called this."""
    total(torch.zeros(1))


def _end(number: int, _frame: object) -> None:
    _ignore_signals()
    raise KeyboardInterrupt if number == signal.SIGINT else RunEnded


def _ignore_signals() -> None:
    """Let this process end undisturbed: torchrun repeats a SIGINT that a terminal has sent to every process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
