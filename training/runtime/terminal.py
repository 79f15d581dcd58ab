"""Lines and progress bars on a terminal, of the main process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from training.runtime import distributed

T = TypeVar("T")


def say(what: str | Table, console: Console | None = None) -> None:
    """Print one line as it is, not wrapped and without markup, or a table.

    Args:
        what: the line or the table.
        console: where to; stdout of the main process if not given.
    """
    console = console or Console(quiet=not distributed.is_main())
    if isinstance(what, str):
        console.print(what, highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(what)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, with the count, the time and the ETA; nothing where stderr is not a terminal.

    Args:
        description: the work, e.g. "Extracting features, frames".
        total: how many units there are.

    Yields:
        A function to call with the number of units just done.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal and distributed.is_main()),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield the items, and show by a bar how many are done."""
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)
