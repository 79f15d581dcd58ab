"""Everything there is to know on a GPU: parity, then speed and memory, printed and kept as it goes.

    python -m benchmarks.gpu
    TRITON_INTERPRET=1 python -m benchmarks.gpu --toy        # whether it runs, where there is no GPU

Float32 is multiplied in TF32, here and in eager; "autocast" is bfloat16 maps beside float32 weights, as a backbone
under autocast leaves them. Graphed rows replay CUDA graphs. Every row is held to the float64 oracle before it is timed,
compiled and graphed ones too. A section runs in a process of its own: one that crashes or hangs loses itself alone.
What is not within parity, does not run, or does not fit in the time is left out and named, and the run exits with an
error at its end. Roofline: the compulsory bytes at the rate of this GPU's own copy; 16-bit maps fit in part into the L2
of a large GPU, which brings theirs nearer.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro

from benchmarks import measure, processes, report, table, terminal
from benchmarks.gpu_sections import SECTIONS, TOY, WHY, Run, Sizes
from benchmarks.table import Row
from rru_fast import config

LATE = 60  # seconds a section may be over the time before it is stopped: it began in time


@dataclass
class Options:
    """What to measure."""

    toy: bool = False
    """Small shapes on the CPU, once: whether it runs."""
    seconds: float = 400
    """No section begins after this long; one that is still running a minute later is stopped."""
    repeats: int = 15
    """Rounds; each runs every implementation once."""
    results: Path = Path(__file__).resolve().parent / "results"
    """The folder that gets <gpu>-<date>.json and .md."""


def main(options: Options) -> list[Row]:
    """Check, measure, print and write, a section at a time; returns the rows.

    Raises:
        SystemExit: there is no GPU, or at the end, with what was measured written: a section failed.
    """
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("--toy: got False without a GPU, wanted one, or --toy with TRITON_INTERPRET=1")
    device = torch.device("cpu" if options.toy else "cuda")
    if "triton" not in config.serving(device):
        raise SystemExit(f"triton: got a backend that does not serve: {config.BACKENDS['triton']}")
    begin = time.monotonic()
    copy = measure.copy_rate(64 * measure.MIB if options.toy else 1024 * measure.MIB, device)
    run = Run(TOY, device, copy, 1, 0) if options.toy else Run(Sizes(), device, copy, options.repeats, 2)
    left_out: dict[str, str] = {}
    environment = measure.environment(device) | {"op": "gpu", "roofline": f"{copy / 1e9:.0f} GB/s"}
    environment["left out"] = left_out
    path = _path(options)
    rows: list[Row] = []
    _keep(path, environment, rows)  # a folder that cannot be written is told before anything is measured
    for title in SECTIONS:
        left = options.seconds - (time.monotonic() - begin)
        found: list[Row] | str = f"{options.seconds:.0f} s are over"
        if left >= 0:
            found = processes.rows_of(_section, (title, run), left + LATE)
        if isinstance(found, str):
            left_out[title] = found
            print(f"{title}: left out, {found}")
        else:
            rows += found
            terminal.show(title, environment, found, hide=table.SHARED)
        _keep(path, environment, rows)
        print(f"{time.monotonic() - begin:.0f} s; {path}")
    failed = [f"{title}: {why}" for title, why in left_out.items() if not why.endswith("are over")]
    failed += [f"{row['mode']}, {row['implementation']}: {row[WHY]}" for row in rows if row[WHY]]
    if failed:
        raise SystemExit("left out:\n  " + "\n  ".join(failed))
    return rows


def _path(options: Options) -> Path:
    """Where the results go: what an earlier run of the day has left stays."""
    name = "toy" if options.toy else torch.cuda.get_device_name().lower().replace(" ", "-")
    numbers = ("", *(f"-{number}" for number in range(2, 1000)))
    paths = (options.results / f"{name}-{date.today().isoformat()}{number}.json" for number in numbers)
    return next(path for path in paths if not path.exists())


def _keep(path: Path, environment: Row, rows: list[Row]) -> None:
    measure.write(path, environment, rows)
    page = path.with_suffix(".md")
    page.write_text(report.section(path, {"environment": environment, "rows": rows}, page.parent) + "\n")


def _section(title: str, run: Run) -> list[Row]:
    torch.set_float32_matmul_precision("highest" if run.device.type == "cpu" else "high")  # eager has no TF32 on a CPU
    op, section = SECTIONS[title]
    rows = section(run)
    # One that was left out has no more than its name and shape.
    columns = dict.fromkeys([key for row in rows for key in row] + [WHY])
    return [{**columns, **row, "op": op, "mode": title} for row in rows]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
