"""Floors: calls so small that most of their time is not a kernel's, here and in another checkout of the library.

    python -m benchmarks.floors
    python -m benchmarks.floors --against ../before

In microseconds on a CPU, float32; each is first held to float64. With `--against`, both checkouts are measured in turn
in processes of their own; the other one's kernels must be built. A row's speed-up over eager PyTorch, written with one
matrix of distances for all groups, is of forward with backward.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.harness.results import ROOT, check_numbers, environment, write
from benchmarks.implementations import floors
from benchmarks.implementations.floors import BACKWARD, EVAL, FORWARD
from benchmarks.reports import terminal
from benchmarks.reports.table import Row

Times = dict[str, dict[str, float]]
COLUMNS = (EVAL, FORWARD, BACKWARD)


@dataclass
class Options:
    """Measure small calls."""

    against: Path | None = None
    """Another checkout of the library, with its kernels built."""
    repeats: int = 3
    """Processes per checkout."""
    json: Path | None = None
    """File to write the rows to."""


def main(options: Options) -> list[Row]:
    """Measure and print; returns a row per case, in microseconds.

    Raises:
        SystemExit: an option is wrong, a checkout cannot be measured, or its results are wrong.
    """
    check_numbers(options)
    if options.against is not None and not options.against.is_dir():
        raise SystemExit(f"against: got {options.against}, wanted a folder")
    checkouts = {"": ROOT} if options.against is None else {" before": options.against.resolve(), "": ROOT}
    runs: dict[str, list[Times]] = {suffix: [] for suffix in checkouts}
    for _ in range(options.repeats):
        for suffix, checkout in checkouts.items():
            runs[suffix].append(_measure(checkout))
    times = {suffix: _medians(of) for suffix, of in runs.items()}
    rows = [_row(name, times) for name in times[""] if not name.startswith("eager")]
    found = environment(torch.device("cpu"), torch.float32)
    terminal.show("floors, microseconds", found, rows)
    if options.json is not None:
        write(options.json, {**found, "op": "floors"}, rows)
    return rows


def _measure(checkout: Path) -> Times:
    """Return the times by case and column that a process with this checkout's library measures."""
    command = [sys.executable, str(Path(floors.__file__).resolve()), str(checkout)]
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=variables, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = ["", *done.stderr.strip().splitlines()][-1]
        raise SystemExit(f"checkout: got {checkout}, which ended with {done.returncode}: {last}")
    found: Times = json.loads(done.stdout)
    return found


def _medians(runs: list[Times]) -> Times:
    return {name: {column: median(run[name][column] for run in runs) for column in COLUMNS} for name in runs[0]}


def _row(name: str, times: dict[str, Times]) -> Row:
    """Return a case's times here and, where measured, before, and the speed-ups over eager PyTorch."""
    row: Row = {"implementation": name}
    for column in COLUMNS:
        row |= {f"{column}{suffix} us": times[suffix][name][column] for suffix in times}
    peer = name.replace("batch_hard", "eager", 1)
    for suffix in times:
        if peer != name:
            row[f"x eager{suffix}"] = times[suffix][peer][BACKWARD] / times[suffix][name][BACKWARD]
    return row


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
