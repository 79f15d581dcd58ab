"""Lines and progress bars on a terminal, of the main process alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from training.runtime import distributed
from training.runtime.command import uninterrupted

T = TypeVar("T")


class _Count(MofNCompleteColumn):
    """Done and total units with their name; nothing if the total is not known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task).append(f" {task.fields['unit']}".rstrip())


class _Eta(TimeRemainingColumn):
    """Time left; nothing if the total is not known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text.assemble("ETA ", super().render(task))


class Bars(Progress):
    """Rows of a description, a bar, the count, the time and the ETA, as wide as the terminal.

    Args:
        console: where they are drawn.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # as wide as the other columns allow
            _Count(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            _Eta(table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=math.inf,  # a unit may take minutes
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # lines for a file must reach it
            expand=True,
        )


_bars: Bars | None = None  # on the terminal now


def say(what: str | Table, console: Console | None = None) -> None:
    """Print one line as it is, not wrapped and without markup, or a table.

    Args:
        what: the line or the table.
        console: where to; stdout of the main process if not given.
    """
    if console is None and _bars and _bars.live.is_started and sys.stdout.isatty():
        _bars.stop()  # else the line would end up in the middle of the bars
        say(what, Console())
        _bars.start()
        return
    console = console or Console(quiet=not distributed.is_main())
    if isinstance(what, str):
        console.print(what, highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(what)


def draw_bars_in(bars: Bars | None) -> None:
    """Add rows to `bars`, which the caller draws, for all progress from now on; `None` ends that."""
    global _bars
    _bars = bars


@contextmanager
def progress(description: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show a bar on stderr, with the count, the time and the ETA; nothing where stderr is not a terminal.

    A bar inside another's block is drawn below it, and one of an evaluation during training inside the run's view.

    Args:
        description: the work, e.g. "Extracting features".
        total: number of units; `None` where it is not known.
        unit: the name of the units, in the plural.

    Yields:
        A function to call with the number of units just done.
    """
    if parent_process() is not None or not distributed.is_main():
        yield _ignore
        return
    own = Bars(Console(stderr=True)) if _bars is None else None
    if own and not (own.console.is_terminal and sys.stderr.isatty()):  # FORCE_COLOR makes any file a terminal
        yield _ignore
        return
    bars = own or _bars
    assert bars is not None
    if own:
        with uninterrupted():
            draw_bars_in(own)
            own.start()
    task = bars.add_task(description, total=total, unit=unit)
    bars.advance(task, 0)  # the ETA needs a first moment

    @uninterrupted()  # an interrupt could leave the bars' lock taken
    def advance(done: float) -> None:
        bars.advance(task, done)

    try:
        yield advance
    finally:
        with uninterrupted():
            bars.remove_task(task)
            if own:
                own.stop()
                draw_bars_in(None)


def track(
    items: Iterable[T], description: str, total: int, unit: str = "", size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Yield the items, and show by a bar how many are done.

    Args:
        items: to be consumed by a `for` loop, whose end, by an error too, is that of the bar.
        description, total, unit: as `progress` takes them.
        size: number of units in an item.
    """
    with progress(description, total, unit) as advance:
        for item in items:
            yield item
            advance(size(item))


def _ignore(done: float) -> None:
    """Count nothing."""
