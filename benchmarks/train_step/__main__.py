"""Time of training by stages, and the effect of each switch: the real trainer and loader on rendered people.

    python -m benchmarks.train_step --json benchmarks/results/train_step-cpu-2core.json
    python -m benchmarks.train_step --toy      # check that it runs

The reference pipeline is the reference operators in float32 on image files that Pillow resizes one by one as they are
read. Each switch is tried alone on it, then all that do not change the arithmetic together, then the rest. Frames per
second are end to end, including an epoch's first batch and logging; x reference is the median over rounds, in each of
which every pipeline trains for an epoch. The shares of a step are of the same epochs; on a GPU, where watching waits
for the device at every stage, of others.

Before anything is timed, a pipeline's batches of an epoch are compared with the reference's (same clips and labels,
equal pixels, or within 2 gray levels if the device resizes), and its step on the same frames with the reference's in
float64: the loss, every gradient and every weight's change. The pipeline's step in float64 shows that its arithmetic is
the same; its step as timed must be within its rounding. Rounding makes noise of the gradients of a deep network with
random weights: of Inception-v3's step as timed only the loss is compared. A pipeline that fails is left out and named.
Each section runs in its own process, and its rows are written when it ends.
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

from benchmarks.harness.results import environment, write
from benchmarks.reports import table, terminal
from benchmarks.reports.table import Row
from benchmarks.train_step import processes
from benchmarks.train_step.pipelines import CPU, GPU, TOY, Run, packed
from benchmarks.train_step.sections import END_TO_END, WHY, rows
from benchmarks.train_step.validation import NOT_HERE
from training.data.datasets.synthetic import generate
from training.pack import Options as PackOptions
from training.pack import pack

LATE = 60  # seconds over the time limit at which a running section is stopped


@dataclass
class Options:
    """Measure a training step."""

    toy: bool = False
    """Run a toy on the CPU once, to check that it runs."""
    sections: tuple[str, ...] = ()
    """Only sections whose names contain one of these."""
    people: int = 16
    """Identities to render; half of them are trained on."""
    seconds: float = 3600
    """No section begins after this time; one that still runs a minute later is stopped."""
    json: Path | None = None
    """File to write the rows to."""


def main(options: Options) -> list[Row]:
    """Validate, measure, print and write, a section at a time; returns the rows.

    Raises:
        SystemExit: at the end, after the rows are written: a section failed, or a pipeline is wrong.
    """
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.toy else "cpu")
    conditions = environment(device) | {"op": "train_step"}
    sections = TOY if options.toy else CPU if device.type == "cpu" else GPU
    chosen = {
        name: s for name, s in sections.items() if not options.sections or any(o in name for o in options.sections)
    }
    measured: list[Row] = []
    failed: list[str] = []
    with TemporaryDirectory() as folder:
        data = Path(folder) / "people"
        generate(data, people=options.people)
        for form in ("encoded", "pixels"):
            pixels = form == "pixels"
            pack(PackOptions("ilids-vid", packed(data, form), data, splits=(0,), check_counts=False, pixels=pixels))
        for number, (name, section) in enumerate(chosen.items(), 1):
            left = options.seconds - (time.monotonic() - begin)
            run = Run(name, section, data, device)
            found: list[Row] | str = "the time is over"
            if left >= 0:
                print(f"{number}/{len(chosen)}: {name}", flush=True)
                found = processes.rows_of(rows, (run,), left + LATE)
            if isinstance(found, str):
                failed.append(f"{name}: {found}")
                continue
            measured += found
            reasons = {row["pipeline"]: row[WHY] or NOT_HERE for row in found}
            failed += [f"{name}, {key}: {why}" for key, why in reasons.items() if not why.startswith(NOT_HERE)]
            shares = [column for column in found[0] if column.endswith(" %")]
            terminal.show(f"train_step, {name}", conditions, found, hide=(*table.SHARED, *shares))
            timed = [row for row in found if row[WHY] is None]
            terminal.show("shares of a step", conditions, timed, hide=(*table.SHARED, *END_TO_END, WHY))
            if options.json is not None:
                write(options.json, conditions, measured)
    if failed:
        raise SystemExit("left out:\n  " + "\n  ".join(failed))
    return measured


if __name__ == "__main__":
    main(tyro.cli(Options, prog="benchmarks.train_step", description=__doc__))
