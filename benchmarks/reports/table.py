"""Rows of a run as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
# Columns that a title or a caption gives once for all rows, or that only a drawing uses.
SHARED = ("op", "mode", "shape", "threads", "roofline ms")


def columns(rows: list[Row], hide: Sequence[str] = ()) -> list[str]:
    """Return the keys of all rows in order, without those in `hide`."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in hide))


def markdown(rows: list[Row], hide: Sequence[str] = ()) -> str:
    """Return a table of the rows; leaves out columns in `hide` and columns without any value."""
    names = [c for c in columns(rows, hide) if any(row.get(c) is not None for row in rows)]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *([cell(c, row.get(c)) for c in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(column: str, value: Any) -> str:
    """Return a value as text.

    Ratios, "x ...", have two decimals, other floats three digits; a missing value is a dash, a shape joined by x.
    """
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    if isinstance(value, float) and column.startswith("x "):
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
