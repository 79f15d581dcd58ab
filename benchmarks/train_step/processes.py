"""A section of a benchmark in a process of its own: one that crashes or hangs loses itself alone."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.implementations import refine as contenders
from benchmarks.reports.table import Row
from training.runtime.command import end_with_parent

Section = Callable[..., list[Row]]


def rows_of(section: Section, arguments: tuple[Any, ...], seconds: float) -> list[Row] | str:
    """The rows of `section(*arguments)`, or why there are none.

    Args:
        section: a function of a module.
        arguments: what it is given; they are pickled.
        seconds: after which it is stopped.
    """
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_run, args=(section, arguments, sender, get_start_method()))
    process.start()
    sender.close()  # the process has the other end: what it leaves open, its death closes
    try:
        if not receiver.poll(seconds):
            return f"stopped after {seconds:.0f} s"
        found: list[Row] | str = receiver.recv()
        return found
    except EOFError:
        process.join()
        return f"its process ended with status {process.exitcode}"
    finally:
        process.join(5)  # to say what it has to say
        process.kill()
        process.join()


def _run(section: Section, arguments: tuple[Any, ...], sender: Connection, start_method: str) -> None:
    # Its own processes start as the caller's would: else they are spawned too, and a loader's workers import it all.
    set_start_method(start_method, force=True)
    end_with_parent()  # left alone, a section would hold the GPU
    try:
        answer: list[Row] | str = section(*arguments)
    except Exception as error:  # whatever it is, the other sections go on
        traceback.print_exc()
        answer = contenders.told(error)
    sys.stdout.flush()
    sender.send(answer)
