"""Draw the measured runs and write their tables into the README, so that no figure there is typed by hand.

    python -m benchmarks.refine --json benchmarks/results/refine-cpu-2core.json    # and the other benchmarks likewise
    python -m benchmarks.report
    python -m benchmarks.report --check

Every run of `benchmarks/results/*.json` becomes tables between the README's markers of its operator, `<!-- refine -->`
and `<!-- /refine -->`; runs of refine, scaling and memory are also drawn, to a PNG of the same name in that folder. All
runs of a machine, `<op>-<machine>.json`, share one drawing of speed-ups, between `<!-- speed_up -->` and
`<!-- /speed_up -->`. A run of losses, whose tables are long, is written to a page of its own, `losses-<machine>.md` in
that folder. Runs in a folder of their own, of another machine, are written to a page there, which is created if there
is none:

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from benchmarks.harness.results import ROOT
from benchmarks.reports import drawing, speed_up, style, table
from benchmarks.reports.table import Row
from build_tools import palette
from build_tools.pages import check_markers, replace_section

# Keys of a run's environment in its caption.
CAPTION = ("hardware", "threads", "dtype", "backend", "torch", "commit", "date", "roofline")
OWN_PAGE = "losses"  # its tables have a row for every published loss
DRAWN = {"refine": drawing.refine, "scaling": drawing.scaling, "memory": drawing.memory}
PLACES = ("speed_up", "refine", "scaling", "batch_hard", "strip_pool", "floors", "memory", "train_step", "gpu")
AUTOTUNED = "-autotune"  # suffix of files of autotuned configs that benchmarks.gpu writes next to its runs
Run = dict[str, Any]


@dataclass
class Options:
    """Report measured runs."""

    results: Path = ROOT / "benchmarks" / "results"
    """Folder of measured runs, to which drawings are written too."""
    readme: Path = ROOT / "README.md"
    """Page to write the tables to; created with a section for every operator if it does not exist."""
    check: bool = False
    """Write nothing; fail if a page or a drawing is not up to date with the runs."""


@dataclass(frozen=True)
class Picture:
    """A drawing that has not been drawn yet."""

    draw: Callable[[], Figure]
    source: str
    """Hash of the runs and the code that it is drawn from; the pixels differ between versions of matplotlib."""


def main(options: Options) -> None:
    """Write the drawings and the tables.

    Raises:
        SystemExit: a marker is missing; with `check`, a page or a drawing is out of date.
    """
    paths = [path for path in sorted(options.results.glob("*.json")) if not path.stem.endswith(AUTOTUNED)]
    runs = {path: json.loads(path.read_text()) for path in paths}
    pages = {path.with_suffix(".md"): page(path, run) for path, run in runs.items() if _op(run) == OWN_PAGE}
    runs = {path: run for path, run in runs.items() if _op(run) != OWN_PAGE}
    wanted = pictures(runs)
    sections = contents(runs, options.readme.parent)
    before = options.readme.read_text() if options.readme.exists() else _blank(sections)
    after = before
    for op, content in sections.items():
        try:
            check_markers(after, op, f"the runs of {op}")
        except ValueError as error:
            raise SystemExit(f"{options.readme}: {error}") from error
        after = replace_section(after, op, content)
    if options.check:
        stale = [str(path) for path, picture in wanted.items() if style.source(path) != picture.source]
        stale += [str(path) for path, text in pages.items() if not path.exists() or path.read_text() != text]
        stale += [str(options.readme)] * (after != before)
        if stale:
            raise SystemExit(f"stale: {', '.join(stale)}; run: python -m benchmarks.report")
        print(f"{options.readme} and {len(wanted)} drawings in {options.results} are up to date")
        return
    for path, picture in wanted.items():
        style.save(picture.draw(), picture.source, path)
    for path, text in pages.items():
        path.write_text(text)
    options.readme.write_text(after)
    written = ", ".join(map(str, [options.readme, *pages]))
    print(f"wrote tables to {written} and {len(wanted)} drawings to {options.results}")


def _blank(ops: Iterable[str]) -> str:
    places = (f"## {op}\n\n<!-- {op} -->\n<!-- /{op} -->\n" for op in sorted(ops, key=PLACES.index))
    return "\n".join(["# Measured\n", *places])


def pictures(runs: dict[Path, Run]) -> dict[Path, Picture]:
    """Return the drawing of each run that has one, and of each machine's runs together, by file."""
    found = {
        path.with_suffix(".png"): Picture(partial(DRAWN[_op(run)], run, caption([run])), _hash([run]))
        for path, run in runs.items()
        if _op(run) in DRAWN
    }
    for path, own in _machines(runs).items():
        found[path] = Picture(partial(speed_up.draw, own, caption(own)), _hash(own))
    return found


def contents(runs: dict[Path, Run], folder: Path) -> dict[str, str]:
    """Return the sections of a page in `folder`, by marker."""
    found = {}
    for op, group in groupby(sorted(runs, key=lambda path: _op(runs[path])), key=lambda path: _op(runs[path])):
        found[op] = "\n\n".join(section(path, runs[path], folder) for path in group)
    drawn = [f"![speed-up]({_relative(path, folder)})" for path in _machines(runs)]
    return found | ({"speed_up": "\n\n".join(drawn)} if drawn else {})


def section(path: Path, run: Run, folder: Path) -> str:
    """Return the section of a run on a page in `folder`: its caption, its drawing if it has one, and its tables."""
    parts = [f"*{caption([run])}; [{path.name}]({_relative(path, folder)})*"]
    if _op(run) in DRAWN:
        picture = path.with_suffix(".png")
        parts.append(f"![{_op(run)}]({_relative(picture, folder)})")
    for title, rows in tables(run).items():
        parts.append(f"{title}\n\n{table.markdown(rows, hide=_hidden(run))}")
    return "\n\n".join(parts)


def page(path: Path, run: Run) -> str:
    """Return the page of a run that has one of its own, in the folder of its file."""
    return f"# {_op(run)}\n\n{section(path, run, path.parent)}\n"


def tables(run: Run) -> dict[str, list[Row]]:
    """Return a run's rows by the title of their table: a table per shape and mode, unless its rows are shapes."""
    if _op(run) == "scaling":
        ours = run["environment"]["ours"]
        return {f"Forward + backward; x: how many times faster {ours} is; -: parity fails there": run["rows"]}
    found: dict[str, list[Row]] = {}
    for row in run["rows"]:
        found.setdefault(_title(run["environment"], row), []).append(row)
    return found


def caption(runs: Sequence[Run]) -> str:
    """Return the conditions that all runs share, as text."""
    first, *others = (run["environment"] for run in runs)
    shared = [key for key in CAPTION if key in first and all(other.get(key) == first[key] for other in others)]
    return ", ".join(f"{key} {first[key]}" for key in shared)


def _title(environment: Row, row: Row) -> str:
    if environment["op"] == "memory":
        return f"`{row['op']}`, peak of forward + backward"
    if environment["op"] == "floors":
        return "Microseconds of a call; x eager: forward + backward"
    if environment["op"] == "losses":
        return f"N {row['n']}, D {row['d']}, forward + backward; -: not measured"
    shape = row.get("shape", environment.get("shape"))
    shape = environment["shapes"][shape] if isinstance(shape, str) else shape
    words = [f"`{row.get('op', environment['op'])}`", table.cell("shape", shape), row.get("mode")]
    return ", ".join(word for word in words if word)


def _hidden(run: Run) -> tuple[str, ...]:
    return {"scaling": (), "memory": ("op",), "losses": ("n", "d")}.get(_op(run), table.SHARED)


def _machines(runs: dict[Path, Run]) -> dict[Path, list[Run]]:
    """Return each machine's runs that have speed-ups, in the order of LINES, by the file of their drawing."""
    found: dict[Path, list[Run]] = {}
    for op in speed_up.LINES:
        for path, run in runs.items():
            if _op(run) == op:
                machine = path.stem.removeprefix(f"{op}-")
                found.setdefault(path.with_name(f"speed_up-{machine}.png"), []).append(run)
    return found


def _hash(runs: Sequence[Run]) -> str:
    code = [inspect.getsource(module) for module in (drawing, speed_up, style, palette)]
    return hashlib.sha256(json.dumps([*runs, caption(runs), *code], sort_keys=True).encode()).hexdigest()


def _op(run: Run) -> str:
    return str(run["environment"]["op"])


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
