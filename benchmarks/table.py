"""The rows of a run as a table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(title: str, environment: dict[str, Any], rows: list[dict[str, Any]], notes: str = "") -> None:
    """Print rows under their keys; floats with three digits, missing values as a dash."""
    table = Table(
        title=title, caption=", ".join(f"{k} {v}" for k, v in environment.items()) + notes, title_justify="left"
    )
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=max(Console().width, 150)).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
