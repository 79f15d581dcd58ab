"""Run a command: bad input in one line on stderr, bugs with a traceback, interrupts, orphans, optional libraries."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import parent_process
from traceback import walk_tb
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from training.runtime import distributed
from training.runtime.errors import UserError


def run_command(main: Callable[[], object], several: bool = False) -> None:
    """Run a command; exit 2 with `error: ...` on bad input, 130 when interrupted, and let bugs through.

    Under torchrun the first process that ends prints the line, and torchrun's report has the exception of each.

    Args:
        main: the command.
        several: True if it can run in several processes, as torchrun starts them.
    """
    warnings.showwarning = lambda message, *_: _print_warning(message)
    threading.excepthook = _thread_excepthook
    run: Callable[[], None] = partial(_in_group, main, several)
    try:
        record(run)() if dist.is_torchelastic_launched() else run()
    except KeyboardInterrupt as interrupt:
        _exit(str(interrupt) or "interrupted", 130)
    except distributed.RunEnded as ended:
        _exit(f"error: {ended}", 1)
    except (OSError, ValueError) as error:
        if not _is_bad_input(error):
            raise
        _exit(f"error: {error}", 2)


def _in_group(main: Callable[[], object], several: bool) -> None:
    with distributed.processes():
        if distributed.world() > 1 and not several:
            raise UserError(f"torchrun: got {distributed.world()} processes, wanted 1 for this command")
        main()


def _exit(line: str, status: int) -> NoReturn:
    """Exit with a status; of several processes the first one to do so prints the line."""
    if distributed.first_to_report():
        _print_error(line)
    sys.exit(status)


def _print_error(line: str) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")


def _print_warning(message: Warning | str) -> None:
    if distributed.is_main():
        _print_error(f"warning: {message}")


def _is_bad_input(error: OSError | ValueError) -> bool:
    """Return True if a file or the user's input is wrong; another ValueError is a bug."""
    return isinstance(error, OSError | UserError) or _raised_by_the_library(error)


def _raised_by_the_library(error: ValueError) -> bool:
    """Return True if the raise statement is in `rru_fast`: a check of an argument, not a bug met on the way."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("rru_fast.")


def _thread_excepthook(raised: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, but for an OSError: TensorBoard's thread raises it again in its next caller."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer SIGINT, and SIGTERM where Python handles it, to the end of the block.

    Their handlers raise between any two instructions, also after a thread's lock is acquired and before its release
    is ensured: whoever waits for that lock then waits forever.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    deferred: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: deferred.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if deferred:
            signal.raise_signal(deferred[0])


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise SystemExit on SIGTERM inside the block, where it would end the process at once."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent() -> None:
    """End this process, one that multiprocessing started, as soon as its parent has ended, even by SIGKILL."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def need(library: str, extra: str) -> Any:
    """Import an optional library.

    Args:
        library: name of the module.
        extra: extra of this project that installs it.

    Returns:
        The module.

    Raises:
        UserError: the import fails.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(f"{library}: not usable here ({error}), wanted: pip install '.[{extra}]'") from error
