"""The rows of a run as a table, in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
# What a title or a caption says once for all rows, or what only a drawing needs.
SHARED = ("op", "mode", "shape", "threads", "roofline ms")


def show(title: str, environment: Row, rows: list[Row], notes: str = "", hide: Sequence[str] = ()) -> None:
    """Print rows under their keys, but for those in `hide`."""
    table = Table(
        title=title, caption=", ".join(f"{k} {v}" for k, v in environment.items()) + notes, title_justify="left"
    )
    columns = [column for column in rows[0] if column not in hide]
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(cell(column, row[column]) for column in columns))
    Console(width=max(Console().width, 170)).print(table)


def markdown(rows: list[Row], hide: Sequence[str] = ()) -> str:
    """Rows under their keys, but for those in `hide` and those that no row has a value for."""
    columns = [c for c in rows[0] if c not in hide and any(row[c] is not None for row in rows)]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *([cell(c, row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(column: str, value: Any) -> str:
    """Ratios, "x ...", with two decimals, other floats with three digits, a missing value as a dash, a shape with x."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    if isinstance(value, float) and column.startswith("x "):
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
