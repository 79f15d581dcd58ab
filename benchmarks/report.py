"""Draws the measured runs and writes their tables into the README, so that no figure there is typed by hand.

    python -m benchmarks.refine --json benchmarks/results/refine-cpu-2core.json    # and the other benchmarks likewise
    python -m benchmarks.report
    python -m benchmarks.report --check

Every run of `benchmarks/results/*.json` becomes tables between the README's markers of its operator, `<!-- refine -->`
and `<!-- /refine -->`; those of DRAWN are drawn to a PNG of the same name beside it. Of a machine's runs together,
`<op>-<machine>.json`, comes one drawing of all speed-ups, between `<!-- speed_up -->` and `<!-- /speed_up -->`.
Another machine's runs, in a folder of their own, become a page there, which is begun if there is none:

    python -m benchmarks.report --results build/bench --readme build/bench/README.md
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from benchmarks.reports import drawing, speed_up, style, table
from benchmarks.reports.table import Row

ROOT = Path(__file__).resolve().parent.parent
# What the caption says of a run; its rows say the rest.
CAPTION = ("hardware", "threads", "dtype", "torch", "commit", "date", "roofline")
DRAWN = {"refine": drawing.refine, "scaling": drawing.scaling, "memory": drawing.memory}
PLACES = ("speed_up", "refine", "scaling", "batch_hard", "strip_pool", "memory", "train_step", "gpu")
AUTOTUNED = "-autotune"  # end of the names of files that benchmarks.gpu writes with its runs
Run = dict[str, Any]


@dataclass
class Options:
    """What to read and to write."""

    results: Path = ROOT / "benchmarks" / "results"
    """The folder of measured runs; drawings go there too."""
    readme: Path = ROOT / "README.md"
    """The page whose tables are written; one that is not there yet gets a place for all that was measured."""
    check: bool = False
    """Write nothing; fail if the page or a drawing is not what the runs make of it."""


@dataclass(frozen=True)
class Picture:
    """A drawing to be made."""

    draw: Callable[[], Figure]
    source: str
    """The hash of what it is drawn from, runs and code: the pixels differ between versions of matplotlib."""


def main(options: Options) -> None:
    """Draw, and write the tables.

    Raises:
        SystemExit: a marker is missing; with `check`, the page or a drawing is not what it would be made.
    """
    paths = [path for path in sorted(options.results.glob("*.json")) if not path.stem.endswith(AUTOTUNED)]
    runs = {path: json.loads(path.read_text()) for path in paths}
    wanted = pictures(runs)
    said = contents(runs, options.readme.parent)
    before = options.readme.read_text() if options.readme.exists() else _blank(said)
    after = before
    for op, content in said.items():
        after = _replaced(after, op, content, options.readme)
    if options.check:
        stale = [str(path) for path, picture in wanted.items() if style.source(path) != picture.source]
        stale += [str(options.readme)] * (after != before)
        if stale:
            raise SystemExit(f"stale: {', '.join(stale)}; run: python -m benchmarks.report")
        return
    for path, picture in wanted.items():
        style.save(picture.draw(), picture.source, path)
    options.readme.write_text(after)


def _blank(said: Iterable[str]) -> str:
    places = (f"## {op}\n\n<!-- {op} -->\n<!-- /{op} -->\n" for op in sorted(said, key=PLACES.index))
    return "\n".join(["# Measured\n", *places])


def pictures(runs: dict[Path, Run]) -> dict[Path, Picture]:
    """By its file, the drawing of each run that has one, and of each machine's runs together."""
    found = {
        path.with_suffix(".png"): Picture(partial(DRAWN[_op(run)], run, caption([run])), _hash([run]))
        for path, run in runs.items()
        if _op(run) in DRAWN
    }
    for path, own in _machines(runs).items():
        found[path] = Picture(partial(speed_up.draw, own, caption(own)), _hash(own))
    return found


def contents(runs: dict[Path, Run], folder: Path) -> dict[str, str]:
    """By its marker, what a page in `folder` says there."""
    found = {}
    for op, group in groupby(sorted(runs, key=lambda path: _op(runs[path])), key=lambda path: _op(runs[path])):
        found[op] = "\n\n".join(section(path, runs[path], folder) for path in group)
    drawn = [f"![speed-up]({_relative(path, folder)})" for path in _machines(runs)]
    return found | ({"speed_up": "\n\n".join(drawn)} if drawn else {})


def section(path: Path, run: Run, folder: Path) -> str:
    """What a page in `folder` says of a run: its drawing if it has one, its tables, and what they were measured on."""
    parts = [f"*{caption([run])}; [{path.name}]({_relative(path, folder)})*"]
    if _op(run) in DRAWN:
        picture = path.with_suffix(".png")
        parts.append(f"![{_op(run)}]({_relative(picture, folder)})")
    for title, rows in tables(run).items():
        parts.append(f"{title}\n\n{table.markdown(rows, hide=_hidden(run))}")
    return "\n\n".join(parts)


def tables(run: Run) -> dict[str, list[Row]]:
    """A run's rows by the title of their table: one for each shape and mode, except where shapes are rows."""
    if _op(run) == "scaling":
        ours = run["environment"]["ours"]
        return {f"Forward + backward; x: how many times faster {ours} is; -: parity fails there": run["rows"]}
    found: dict[str, list[Row]] = {}
    for row in run["rows"]:
        found.setdefault(_title(run["environment"], row), []).append(row)
    return found


def caption(runs: Sequence[Run]) -> str:
    """What the figures mean nothing without, as far as it is the same of all runs."""
    first, *others = (run["environment"] for run in runs)
    shared = [key for key in CAPTION if key in first and all(other.get(key) == first[key] for other in others)]
    return ", ".join(f"{key} {first[key]}" for key in shared)


def _title(environment: Row, row: Row) -> str:
    if environment["op"] == "memory":
        return f"`{row['op']}`, peak of forward + backward"
    shape = row.get("shape", environment.get("shape"))
    shape = environment["shapes"][shape] if isinstance(shape, str) else shape
    words = [f"`{row.get('op', environment['op'])}`", table.cell("shape", shape), row.get("mode")]
    return ", ".join(word for word in words if word)


def _hidden(run: Run) -> tuple[str, ...]:
    return {"scaling": (), "memory": ("op",)}.get(_op(run), table.SHARED)


def _machines(runs: dict[Path, Run]) -> dict[Path, list[Run]]:
    """By the file of its drawing, each machine's runs of which speed-ups are drawn."""
    found: dict[Path, list[Run]] = {}
    for op in speed_up.LINES:  # in their order
        for path, run in runs.items():
            if _op(run) == op:
                machine = path.stem.removeprefix(f"{op}-")
                found.setdefault(path.with_name(f"speed_up-{machine}.png"), []).append(run)
    return found


def _hash(runs: Sequence[Run]) -> str:
    code = [inspect.getsource(module) for module in (drawing, speed_up, style)]
    return hashlib.sha256(json.dumps([*runs, caption(runs), *code], sort_keys=True).encode()).hexdigest()


def _op(run: Run) -> str:
    return str(run["environment"]["op"])


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _replaced(text: str, op: str, content: str, page: Path) -> str:
    begin, end = f"<!-- {op} -->", f"<!-- /{op} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page}: got no place for the runs of {op}, wanted {begin} ... {end} once")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
