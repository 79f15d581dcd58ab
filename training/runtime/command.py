"""How a command ends: bad input in one line on stderr, a bug in its traceback, interrupts where they are harmless."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import parent_process
from traceback import walk_tb
from typing import Any

from training.runtime import distributed
from training.runtime.errors import UserError


def run_command(main: Callable[[], object], several: bool = False) -> None:
    """Run a command; exit 2 with `error: ...` on bad input, 130 when interrupted, and let bugs through.

    Args:
        main: the command.
        several: whether it knows what to do in several processes, as torchrun starts them; one of them says the line.
    """
    warnings.showwarning = lambda message, *where: _say(f"warning: {message}") if distributed.is_main() else None
    threading.excepthook = _of_a_thread
    try:
        with distributed.processes():
            if distributed.world() > 1 and not several:
                raise UserError(f"torchrun: got {distributed.world()} processes, wanted 1 for this command")
            main()
    except KeyboardInterrupt as stopped:
        _say(str(stopped) or "interrupted")
        sys.exit(130)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, UserError) and not _raised_by_the_library(error):
            raise
        if distributed.first_to_tell():
            _say(f"error: {error}")
        sys.exit(2)


def _raised_by_the_library(error: ValueError) -> bool:
    """Whether the raise itself stands in `rru_fast`: then it is a check of an argument, not a bug met on the way."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("rru_fast.")


def _of_a_thread(raised: threading.ExceptHookArgs) -> None:
    """Tell of what ended a thread; but TensorBoard's, ended by a full disk, hands the error to its next caller."""
    if not isinstance(raised.exc_value, OSError):
        threading.__excepthook__(raised)


def _say(line: str) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interrupt (SIGINT) that comes inside the block take effect at its end.

    A KeyboardInterrupt may rise between any two instructions, also where a thread's lock is taken and not yet known
    to be: whoever waits for that lock then waits forever.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield  # the interrupt is another's to handle
        return
    came = False

    def put_off(*_: object) -> None:
        nonlocal came
        came = True

    try:
        signal.signal(signal.SIGINT, put_off)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def end_with_parent() -> None:
    """Have this process, one that multiprocessing started, end as soon as the one that started it has, however."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def need(library: str, extra: str) -> Any:
    """The module of a library.

    Args:
        library: its name.
        extra: the extra of this project that brings it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(f"{library}: not usable here ({error}), wanted: pip install '.[{extra}]'") from error
