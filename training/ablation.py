"""Run the paper's ablation on rendered people, by their rate of occlusion: `python -m training.ablation`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import json
import multiprocessing
import shlex
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from training.data.datasets import synthetic
from training.engine import resumable_run
from training.engine.options import Options as RunOptions
from training.engine.options import make_options
from training.reports.ablation_table import markdown
from training.reports.environments import environments_of
from training.reports.page import check_page, fill_page
from training.runtime.atomic_files import write_atomic
from training.runtime.command import end_with_parent, run_command
from training.runtime.errors import UserError
from training.runtime.terminal import progress, say
from training.show.ablation_plot import draw
from training.show.board import pictures
from training.show.picture import png

# Rows of Table 1, in its order.
ROWS = (
    "Baseline",
    "Baseline+Lv",
    "Baseline+LSTM+Lv",
    "Baseline+STIM+Lv",
    "Baseline+RRU+Lv",
    "Baseline+RRU+STIM+Lv",
    "Baseline+RRU+STIM+Lv+Lp",
)
RESULTS, PLOT = "ablation.json", "ablation.png"
PLACE = "ablation"  # on a page


@dataclass
class Options:
    """Train rows of the paper's Table 1 on rendered people at several rates of occlusion, and report the figures.

    Runs that the output already holds are not trained again.
    """

    occlusion: tuple[float, ...] = (0.0, 0.4, 0.8)
    """Expected shares of a tracklet's frames in which an occluder covers the middle; each makes one dataset."""
    rows: tuple[Literal[ROWS], ...] = ROWS  # type: ignore[valid-type]
    """Rows of Table 1."""
    seeds: int = 3
    """Number of seeds, from 0; a seed decides weights, order and dropout, and which half of the people is held out."""
    epochs: int = 7
    """Passes over the sampler."""
    batches: int = 20
    """Batches per epoch."""
    people: int = synthetic.PEOPLE
    """People in each dataset; the same ones, on the same walks, at each rate."""
    blur: float = 0.2
    """Expected share of a tracklet's frames with motion blur."""
    jobs: int = 2
    """Runs trained in parallel, each on one thread, so that the figures do not depend on it."""
    output: Path = Path("runs/ablation")
    """Folder for the datasets, the runs, ablation.json and ablation.png."""
    readme: Path | None = None
    """Page to write the table to, between its markers; its folder gets copies of ablation.json and ablation.png."""

    @property
    def command(self) -> str:
        """Command line that reproduces the figures."""
        words = ["python", "-m", "training.ablation"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in ("jobs", "output", "readme"):
                words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
        return shlex.join(words)


@dataclass(frozen=True)
class Cell:
    """One run of the ablation: a row, a rate and a seed."""

    occlusion: float
    row: str
    seed: int

    def data(self, output: Path) -> Path:
        """Folder of its dataset."""
        return output / f"occlusion-{self.occlusion:g}" / "data"

    def folder(self, output: Path) -> Path:
        """Folder of the run."""
        return output / f"occlusion-{self.occlusion:g}" / self.row / f"seed-{self.seed}"

    def run_options(self, options: Options) -> RunOptions:
        """Options of the run."""
        return make_options(
            recipe="quick",
            row=self.row,
            dataset="ilids-vid",  # the layout of the data; "synthetic" is a dataset with rates of its own
            data_root=self.data(options.output),
            check_counts=False,
            split=self.seed,
            seed=self.seed,
            epochs=options.epochs,
            batches=options.batches,
            output=self.folder(options.output),
            compare_ops=False,
        )


def cells(options: Options) -> list[Cell]:
    """Return all runs, ordered by rate, seed and row.

    Raises:
        UserError: an option is out of range.
    """
    for name in ("occlusion", "rows"):
        if not getattr(options, name):
            raise UserError(f"{name}: got none, wanted at least one")
    for name, rate in [("blur", options.blur), *(("occlusion", rate) for rate in options.occlusion)]:
        synthetic.check_rate(name, rate)
    if not 1 <= options.seeds <= synthetic.SPLITS:
        raise UserError(f"seeds: got {options.seeds}, wanted 1 to {synthetic.SPLITS}, one per split")
    if options.jobs < 1:
        raise UserError(f"jobs: got {options.jobs}, wanted at least 1")
    if options.people < 4:
        raise UserError(f"people: got {options.people}, wanted at least 4: two to train on, two held out")
    rates, rows = sorted(set(options.occlusion)), [row for row in ROWS if row in options.rows]
    found = [Cell(rate, row, seed) for rate in rates for seed in range(options.seeds) for row in rows]
    found[0].run_options(options)  # raises where options do not go together
    return found


def ablate(options: Options) -> None:
    """Render the data, train the runs, and write the results, a plot and the table.

    Raises:
        UserError: an option is out of range, the page has no place for the table, or the output holds something else.
    """
    planned = cells(options)
    if options.readme:
        check_page(options.readme, PLACE)
    for cell in planned:
        synthetic.generate(cell.data(options.output), options.people, occlusion=cell.occlusion, blur=options.blur)
    try:
        records = _train(planned, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command continues in {options.output}") from None
    ablation = {
        "command": options.command,
        "people": options.people,
        "blur": options.blur,
        "epochs": options.epochs,
        "batches": options.batches,
        "environments": environments_of(cell.folder(options.output) for cell in planned),
        "runs": [{**asdict(cell), **records[cell]} for cell in planned],
    }
    table = markdown(ablation)
    try:
        for folder in [options.output, *([options.readme.parent] if options.readme else [])]:
            (folder / RESULTS).write_text(json.dumps(ablation, indent=2) + "\n")
            write_atomic(folder / PLOT, png(draw(ablation)))
        if options.readme:
            fill_page(options.readme, PLACE, f"![rank-1 and mAP by the rate of occlusion]({PLOT})\n\n{table}")
    except OSError as error:
        raise UserError(f"output: {error}") from error
    say(table)
    say(f"plot: {options.output / PLOT}")
    say(f"results: {options.output / RESULTS}")
    if options.readme:
        say(f"page: {options.readme}, with {RESULTS} and {PLOT} in its folder")


def _train(planned: list[Cell], options: Options) -> dict[Cell, dict[str, Any]]:
    """Train the runs that are missing; returns the result of each run's last epoch."""
    say(f"{len(planned)} runs in {options.output}, {options.jobs} side by side")
    records = {}
    missing = {cell for cell in planned if not (cell.folder(options.output) / resumable_run.RESULT).exists()}
    with (
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _begin_worker) as pool,
        progress("Training", len(missing), "runs") as advance,
    ):
        try:
            running = {pool.submit(_train_one, cell, options): cell for cell in planned}
            for future in as_completed(running):
                cell, record = running[future], future.result()
                records[cell] = record
                advance(cell in missing)  # finished runs take no time and would distort the ETA
                where = f"{len(records)}/{len(planned)}  occlusion {cell.occlusion:g}  seed {cell.seed}  {cell.row}"
                scores = f"rank-1 {100 * record['rank-1']:.1f}  mAP {100 * record['mAP']:.1f}"
                say(f"{where}  {scores}")
        except BrokenProcessPool as error:
            line = "a run's process was killed, perhaps for want of memory"
            raise UserError(f"{line}; the same command continues, --jobs 1 needs less") from error
        except BaseException:  # also an interrupt: the next start continues the runs
            for process in multiprocessing.active_children():
                process.kill()
            raise
    return records


def _train_one(cell: Cell, options: Options) -> dict[str, Any]:
    """Train a run and return the result of its last epoch; its output goes to a log file next to its folder."""
    folder = cell.folder(options.output)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log").open("a")
    except OSError as error:
        raise UserError(f"output: {error}") from error
    with log, redirect_stdout(log), redirect_stderr(log):
        return resumable_run.run(cell.run_options(options), pictures)[-1]


def _begin_worker() -> None:
    """Limit a process of the pool to one thread, and end it with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    end_with_parent()  # an orphan would compete with the next start of the same runs


if __name__ == "__main__":
    run_command(lambda: ablate(tyro.cli(Options, prog="python -m training.ablation")))
