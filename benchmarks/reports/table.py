"""The rows of a run as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
# What a title or a caption says once for all rows, or what only a drawing needs.
SHARED = ("op", "mode", "shape", "threads", "roofline ms")


def columns(rows: list[Row], hide: Sequence[str] = ()) -> list[str]:
    """Every row's keys in order, but for those in `hide`."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in hide))


def markdown(rows: list[Row], hide: Sequence[str] = ()) -> str:
    """Rows under their keys, but for those in `hide` and those that no row has a value for."""
    names = [c for c in columns(rows, hide) if any(row.get(c) is not None for row in rows)]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *([cell(c, row.get(c)) for c in names] for row in rows)]
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
