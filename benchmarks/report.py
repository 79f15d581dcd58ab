"""Draws the measured runs and writes their tables into the README, so that no figure there is typed by hand.

    python -m benchmarks.refine --json benchmarks/results/refine-cpu-2core.json    # and the other benchmarks likewise
    python -m benchmarks.report
    python -m benchmarks.report --check

Every run of `benchmarks/results/*.json` becomes tables between the README's markers of its operator, `<!-- refine -->`
and `<!-- /refine -->`; a run of `refine` or `scaling` is drawn to a PNG of the same name beside it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro

from benchmarks import drawing, table
from benchmarks.table import Row

ROOT = Path(__file__).resolve().parent.parent
# What the caption says of a run; its rows say the rest.
CAPTION = ("hardware", "threads", "dtype", "torch", "commit", "date", "roofline")


@dataclass
class Options:
    """What to read and to write."""

    results: Path = ROOT / "benchmarks" / "results"
    """The folder of measured runs; drawings go there too."""
    readme: Path = ROOT / "README.md"
    """The page whose tables are written."""
    check: bool = False
    """Write nothing; fail if the page does not say what the runs do, or a drawing is missing."""


def main(options: Options) -> None:
    """Draw, and write the tables.

    Raises:
        SystemExit: a marker is missing; with `check`, the page is not what it would be made, or a drawing is missing.
    """
    runs = {path: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    pictures = {path.with_suffix(".png"): run for path, run in runs.items() if run["environment"]["op"] in DRAWN}
    before = options.readme.read_text()
    after = before
    for op, group in groupby(sorted(runs, key=lambda path: _op(runs[path])), key=lambda path: _op(runs[path])):
        sections = [section(path, runs[path], options.readme.parent) for path in group]
        after = _replaced(after, op, "\n\n".join(sections), options.readme)
    if options.check:
        stale = [str(path) for path in pictures if not path.exists()] + [str(options.readme)] * (after != before)
        if stale:
            raise SystemExit(f"stale: {', '.join(stale)}; run: python -m benchmarks.report")
        return
    for path, run in pictures.items():
        DRAWN[_op(run)](run, caption(run), path)
    options.readme.write_text(after)


DRAWN = {"refine": drawing.refine, "scaling": drawing.scaling}


def section(path: Path, run: dict[str, Any], page: Path) -> str:
    """What the README says of a run: its drawing if it has one, its tables, and what they were measured on."""
    parts = [f"*{caption(run)}; [{path.name}]({_relative(path, page)})*"]
    if _op(run) in DRAWN:
        picture = path.with_suffix(".png")
        parts.append(f"![{_op(run)}]({_relative(picture, page)})")
    for title, rows in tables(run).items():
        parts.append(f"{title}\n\n{table.markdown(rows, hide=_hidden(run))}")
    return "\n\n".join(parts)


def tables(run: dict[str, Any]) -> dict[str, list[Row]]:
    """A run's rows by the title of their table: one for each shape and mode, but for scaling, where shapes are rows."""
    if _op(run) == "scaling":
        ours = run["environment"]["ours"]
        return {f"Forward + backward; x: how many times faster {ours} is; -: parity fails there": run["rows"]}
    found: dict[str, list[Row]] = {}
    for row in run["rows"]:
        found.setdefault(_title(run["environment"], row), []).append(row)
    return found


def caption(run: dict[str, Any]) -> str:
    """What the figures mean nothing without."""
    environment = run["environment"]
    return ", ".join(f"{key} {environment[key]}" for key in CAPTION if key in environment)


def _title(environment: Row, row: Row) -> str:
    shape = row.get("shape", environment.get("shape"))
    shape = environment["shapes"][shape] if isinstance(shape, str) else shape
    words = [f"`{row.get('op', environment['op'])}`", table.cell("shape", shape), row.get("mode")]
    return ", ".join(word for word in words if word)


def _hidden(run: dict[str, Any]) -> tuple[str, ...]:
    return () if _op(run) == "scaling" else table.SHARED


def _op(run: dict[str, Any]) -> str:
    return str(run["environment"]["op"])


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page)).as_posix()


def _replaced(text: str, op: str, content: str, page: Path) -> str:
    begin, end = f"<!-- {op} -->", f"<!-- /{op} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page}: got no place for the runs of {op}, wanted {begin} ... {end} once")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
