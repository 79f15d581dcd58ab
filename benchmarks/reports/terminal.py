"""Rows of a run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.reports.table import Row, cell, columns


def show(title: str, environment: Row, rows: list[Row], notes: str = "", hide: Sequence[str] = ()) -> None:
    """Print a table of the rows without the columns in `hide`, captioned with the environment and `notes`."""
    table = Table(
        title=title, caption=", ".join(f"{k} {v}" for k, v in environment.items()) + notes, title_justify="left"
    )
    names = columns(rows, hide)
    for index, column in enumerate(names):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(cell(column, row.get(column)) for column in names))
    Console(width=max(Console().width, 170)).print(table)
