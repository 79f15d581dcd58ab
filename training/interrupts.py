"""Interrupts that wait for what must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
