"""Where the time of training goes, and what each switch makes of it: the real trainer and loader, on rendered people.

    python -m benchmarks.train_step --json benchmarks/results/train_step-cpu-2core.json
    python -m benchmarks.train_step --toy      # whether it runs

The reference pipeline is the reference operators in float32, on image files that Pillow resizes one by one as they are
read. Each switch is tried alone on it, then all that leave the arithmetic as it is together, then the rest. Frames a
second are end to end, an epoch's first batch and logging included; x reference is the median over rounds, in each of
which every pipeline trains for an epoch. The shares of a step are of the same epochs; on a GPU, where watching waits
for the device at every stage, of others.

Before anything is timed a pipeline's batches of an epoch are held to the reference's (clips and labels the same, pixels
equal, or within 2 grey levels where the device resizes), and its step on the same frames to the reference's in
float64: the loss, every gradient and every weight's change. The pipeline's step in float64 shows that its arithmetic is
the same; its step as it is timed is held within its rounding. From random weights a deep network makes noise of rounded
gradients: of Inception-v3's step as timed the loss alone is held. What fails is left out and named. Each section runs
in a process of its own, and what is measured is written as it goes.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from benchmarks.harness import measure
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from benchmarks.train_step import processes
from benchmarks.train_step.sections import CPU, END_TO_END, GPU, NOT_HERE, TOY, WHY, Run, packed, rows
from training.data.datasets.synthetic import generate
from training.pack import Options as PackOptions
from training.pack import pack

LATE = 60  # seconds a section may be over the time before it is stopped: it began in time


@dataclass
class Options:
    """What to measure."""

    toy: bool = False
    """A toy on the CPU, once: whether it runs."""
    sections: tuple[str, ...] = ()
    """Only those whose names contain one of these."""
    people: int = 16
    """How many to render; half of them are trained on."""
    seconds: float = 3600
    """No section begins after this long; one that is still running a minute later is stopped."""
    json: Path | None = None
    """Where to write the rows."""


def main(options: Options) -> list[Row]:
    """Check, measure, print and write, a section at a time; returns the rows.

    Raises:
        SystemExit: at the end, with what was measured written: a section failed, or a pipeline is wrong.
    """
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.toy else "cpu")
    environment = measure.environment(device) | {"op": "train_step"}
    sections = TOY if options.toy else CPU if device.type == "cpu" else GPU
    chosen = {
        name: s for name, s in sections.items() if not options.sections or any(o in name for o in options.sections)
    }
    found_rows: list[Row] = []
    failed: list[str] = []
    with TemporaryDirectory() as folder:
        data = Path(folder) / "people"
        generate(data, people=options.people)
        for how in ("encoded", "pixels"):
            pixels = how == "pixels"
            pack(PackOptions("ilids-vid", packed(data, how), data, splits=(0,), check_counts=False, pixels=pixels))
        for name, section in chosen.items():
            left = options.seconds - (time.monotonic() - begin)
            run = Run(name, section, data, device)
            found: list[Row] | str = "the time is over"
            if left >= 0:
                found = processes.rows_of(rows, (run,), left + LATE)
            if isinstance(found, str):
                failed.append(f"{name}: {found}")
                continue
            found_rows += found
            why = {row["pipeline"]: row[WHY] or NOT_HERE for row in found}
            failed += [f"{name}, {own}: {told}" for own, told in why.items() if not told.startswith(NOT_HERE)]
            shares = [column for column in found[0] if column.endswith(" %")]
            terminal.show(f"train_step, {name}", environment, found, hide=(*table.SHARED, *shares))
            timed = [row for row in found if row[WHY] is None]
            terminal.show("shares of a step", environment, timed, hide=(*table.SHARED, *END_TO_END, WHY))
            if options.json is not None:
                measure.write(options.json, environment, found_rows)
    if failed:
        raise SystemExit("left out:\n  " + "\n  ".join(failed))
    return found_rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
