"""Sections of a benchmark in their own processes: a crash or a hang loses one section only."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness.parity import format_error
from benchmarks.reports.table import Row
from training.runtime.command import end_with_parent

Section = Callable[..., list[Row]]


def rows_of(section: Section, arguments: tuple[Any, ...], seconds: float) -> list[Row] | str:
    """Return the rows of `section(*arguments)`, or the reason why there are none.

    Args:
        section: function of a module.
        arguments: its arguments, which can be pickled.
        seconds: time limit, at which it is stopped.
    """
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_run, args=(section, arguments, sender, get_start_method()))
    process.start()
    sender.close()  # only the process holds this end now, so its death closes the pipe
    try:
        if not receiver.poll(seconds):
            return f"stopped after {seconds:.0f} s"
        found: list[Row] | str = receiver.recv()
        return found
    except EOFError:
        process.join()
        return f"its process ended with status {process.exitcode}"
    finally:
        process.join(5)  # to flush its output
        process.kill()
        process.join()


def _run(section: Section, arguments: tuple[Any, ...], sender: Connection, start_method: str) -> None:
    # Start its own processes by the caller's method: spawned workers of a loader would import everything again.
    set_start_method(start_method, force=True)
    end_with_parent()  # an orphaned section would occupy the GPU
    try:
        answer: list[Row] | str = section(*arguments)
    except Exception as error:  # any error: the other sections still run
        traceback.print_exc()
        answer = format_error(error)
    sys.stdout.flush()
    sender.send(answer)
