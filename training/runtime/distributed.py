"""The processes that torchrun starts: who is who, what they tell each other, and how all end where one does.

Without torchrun there is one process, no process group, and everything here is as if it were not.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# Seconds within which torchrun ends the others, once one has ended; it looks ten times a second.
PATIENCE = 10.0

_store: Store | None = None
_torchrun = 0  # its process id
_kept: Callable[[], str] | None = None


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and shows things."""
    return rank() == 0


@contextmanager
def processes() -> Iterator[None]:
    """Form a process group with the others that torchrun started: gloo for CPUs, NCCL beside it where there are GPUs.

    Where one process ends with an error, is killed or interrupted, torchrun ends the others; one line tells why. One of
    several processes that torchrun started ends with the block.
    """
    global _store, _torchrun
    if not dist.is_torchelastic_launched():
        yield
        return
    _torchrun = os.getppid()
    store, number, count = next(rendezvous("env://"))
    _store = store.clone()  # for the thread that listens: the main one may be using the other
    _listen()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
    except RuntimeError:
        # So a collective tells that another process has ended: torchrun is about to end this one, which then says so.
        time.sleep(PATIENCE)
        raise
    wait_for_all()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.destroy_process_group()
    _leave()


def first_to_tell() -> bool:
    """Whether this process is to tell why all end: the first that asks is, once."""
    if _store is None:
        return True
    return _store.add("told", 1) == 1 if os.getppid() == _torchrun else is_main()  # torchrun keeps the count


def keep(kept: Callable[[], str]) -> None:
    """Have whoever tells that all were ended say also what is left: the text that `kept` then returns."""
    global _kept
    _kept = kept


def from_main(function: Callable[[], T]) -> T:
    """What a function returns, called in the main process alone."""
    if world() == 1:
        return function()
    values = [function() if is_main() else None]
    dist.broadcast_object_list(values)
    return cast(T, values[0])


def main_first(function: Callable[[], T]) -> T:
    """What a function returns in this process, called in the main one before any other."""
    if is_main():
        value = function()
        wait_for_all()
        return value
    wait_for_all()
    return function()


def gathered(value: T) -> list[T]:
    """The value of every process, in order."""
    values: list[T | None] = [None] * world()
    if world() == 1:
        return [value]
    dist.all_gather_object(values, value)
    return cast("list[T]", values)


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; no gradient passes."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Return once every process is here."""
    total(torch.zeros(1))


def _leave() -> NoReturn:
    """End this process in good order, but for the interpreter's own end.

    That ends other threads wherever they are, and one inside PyTorch's C++ takes the process down with SIGABRT.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _listen() -> None:
    """Have a thread end this process on SIGTERM and SIGINT, and where torchrun is gone.

    The main one may be inside a collective for good.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # what Python handles goes to the pipe, whatever the main thread is at
    threading.Thread(target=_end_with_the_others, args=(heard,), daemon=True).start()


def _end_with_the_others(heard: int) -> None:
    number = 0
    while number not in (signal.SIGTERM, signal.SIGINT) and os.getppid() == _torchrun:
        number = os.read(heard, 1)[0] if select.select([heard], [], [], 1.0)[0] else 0
    interrupted = number == signal.SIGINT
    if first_to_tell():
        why = "interrupted" if interrupted else "error: a process of the run has ended, and all with it"
        Console().show_cursor()  # a progress bar may have hidden it
        sys.stderr.write(f"{why}{'; ' + _kept() if _kept else ''}\n")
    os._exit(130 if interrupted else 1)
