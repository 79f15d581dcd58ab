"""The rows of the paper's tables, trained and held beside its figures: `python -m training.reproduce --table 1`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import tyro

from training.config.presets import PAPER, diff_from_preset
from training.config.recipe import Recipe
from training.config.settings import Settings
from training.config.step import StepConfig
from training.config.table1 import FULL, ROWS, paper_figures
from training.data import Dataset
from training.data.config import SourceConfig
from training.engine.options import Base, Machine, base_settings, parse_known, parse_over
from training.engine.options import Options as RunOptions
from training.engine.resumable_run import RESULT, run
from training.engine.run import read_split
from training.model.backbone import make_backbone
from training.reports.environments import environments_of
from training.reports.paper_table import NOTE, Results, compare, markdown, terminal
from training.runtime.atomic_files import write_atomic
from training.runtime.command import run_command
from training.runtime.errors import UserError
from training.runtime.fields import flatten, update
from training.runtime.terminal import say
from training.show.board import pictures

# Which of the paper's datasets a table is of, and the figures that it gives.
DATASETS: dict[int, tuple[Dataset, ...]] = {1: ("ilids-vid", "prid-2011"), 3: ("mars",)}
SCORES = {1: ("rank-1", "rank-5", "rank-20"), 3: ("mAP", "rank-1", "rank-5", "rank-20")}
OTHERS: tuple[Dataset, ...] = ("synthetic", "mot")  # without figures of the paper's
SPLITS: dict[Dataset, int] = {"ilids-vid": 10, "prid-2011": 10, "synthetic": 10, "mars": 1, "mot": 1}


@dataclass(frozen=True)
class Options:
    """Train the rows of one of the paper's tables, each on the splits of a dataset, and compare with its figures.

    Table 1 has twelve rows, on iLIDS-VID or PRID-2011; table 3 has four of them, on MARS. Table 2 is not offered. On
    another dataset there are no figures of the paper's. The same command continues what was killed.
    """

    table: Literal[1, 3]
    """Which of the paper's tables."""
    preset: Literal["paper", "official"] = "paper"
    """The recipe: as the paper says, or as its authors' code has it."""
    splits: int | None = None
    """Number of the dataset's splits, from the first; all if not given."""
    rows: tuple[str, ...] = ()
    """Rows by their names in the paper: Baseline, Baseline+Lv, ...; all of the table's if not given."""
    config: Path | None = None
    """A JSON file of options by their names, or the config.json of a run; other options are over it."""
    output: Path | None = None
    """Folder of all the runs and of the table; runs/reproduce-DATASET-PRESET if not given."""
    recipe: Recipe = PAPER
    source: SourceConfig = field(default_factory=SourceConfig)
    step: StepConfig = field(default_factory=StepConfig)
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True)
class _First:
    """The options that others have their defaults from."""

    table: Literal[1, 3] | None = None
    preset: Literal["paper", "official"] | None = None
    config: Path | None = None
    dataset: Dataset | None = None
    backbone: str | None = None


def parse_options(prog: str, args: Sequence[str] | None = None) -> Options:
    """Read the command line twice: for the preset, then for all options, whose defaults are the preset's.

    Args:
        prog: the command, for the usage.
        args: the words; those of this process if not given.

    Raises:
        UserError: a file cannot be read, or options do not go together.
        SystemExit: an option is unknown or malformed, or --help was asked for.
    """
    base = _base(parse_known(_First, prog, args))
    return parse_over(base, prog, args)


def make_options(table: Literal[1, 3], **given: Any) -> Options:
    """Make options of those given, by their flat names, as the command line does.

    Raises:
        UserError: there is no such option, or options do not go together.
    """
    first = {name: given.get(name) for name in flatten(_First()) if name != "table"}
    return update(_base(_First(table, **first)), **given)


def _base(first: _First) -> Options:
    """Return the options that others are over: of the preset or a file, on the table's dataset."""
    settings = base_settings(Base(recipe=first.preset, config=first.config), first.backbone, default="paper")
    recipe = settings.recipe
    if recipe.name not in ("paper", "official"):
        raise UserError(f"config: got recipe {recipe.name!r} in {first.config}, wanted paper or official")
    dataset = first.dataset or DATASETS[first.table or 1][0]
    recipe = replace(recipe, data=replace(recipe.data, dataset=dataset))
    table = tyro.MISSING if first.table is None else first.table
    return Options(table, recipe.preset, config=first.config, recipe=recipe, source=settings.source, step=settings.step)


def reproduce(options: Options) -> dict[str, Any]:
    """Run what is missing of a table, show it, and leave it as `table.md` and `table.json`.

    Both are brought up to date by every run that ends.

    Returns:
        What `table.json` holds.

    Raises:
        UserError: the options or the data cannot be used, a folder holds other runs, or training diverged.
        KeyboardInterrupt: it was interrupted; the message says what continues it.
    """
    plan = _plan(options)
    # All of them before anything is trained: what is missing is told at once.
    data, *_ = [read_split(plan.run(plan.rows[0], split).settings).description for split in range(plan.splits)]
    try:
        content = _run_all(plan, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command continues in {plan.output}") from None
    say(terminal(content["title"], content["rows"], plan.scores))
    for line in (*content["notes"], f"table.md, table.json and the runs are in {plan.output}"):
        say(line)
    return content


@dataclass(frozen=True)
class _Plan:
    """What is to be run.

    options: of the command line.
    dataset: what to train on.
    rows: names of the rows, in the table's order.
    splits: how many, from the first.
    output: folder of all the runs and of the table.
    """

    options: Options
    dataset: Dataset
    rows: list[str]
    splits: int
    output: Path

    @property
    def scores(self) -> tuple[str, ...]:
        """The figures the table is of."""
        return SCORES[self.options.table]

    def folder(self, row: str, split: int) -> Path:
        """The folder of one run."""
        return self.output / row / f"split-{split}"

    def run(self, row: str, split: int) -> RunOptions:
        """The options of one run."""
        options = self.options
        settings = Settings(ROWS[row].apply(options.recipe), split, options.source, options.step)
        return RunOptions(settings=settings.absolute(), machine=options.machine, output=self.folder(row, split))


def _plan(options: Options) -> _Plan:
    papers = DATASETS[options.table]
    dataset, known = options.recipe.data.dataset, (*papers, *OTHERS)
    if dataset not in known:
        raise UserError(f"dataset: got {dataset!r} for table {options.table}, wanted one of {', '.join(known)}")
    rows = _rows(options.table)
    for name in options.rows:
        if name not in rows:
            raise UserError(f"rows: got {name!r}, wanted some of table {options.table}'s: {', '.join(rows)}")
    full = flatten(FULL.apply(options.recipe))
    for option, value in flatten(options.recipe).items():
        if value != full[option]:
            raise UserError(f"{option}: got {value!r}, wanted {full[option]!r}: the rows of the table set it")
    splits = SPLITS[dataset] if options.splits is None else options.splits
    if splits < 1:
        raise UserError(f"splits: got {splits}, wanted at least 1")
    output = options.output or Path("runs") / f"reproduce-{dataset}-{options.preset}"
    return _Plan(options, dataset, [row for row in rows if row in options.rows or not options.rows], splits, output)


def _rows(table: int) -> list[str]:
    return [name for name in ROWS if DATASETS[table][0] in paper_figures(name)]


def _run_all(plan: _Plan, data: str) -> dict[str, Any]:
    """Read the runs that are finished and train the others, row by row; what the table holds at the end."""
    results: dict[str, dict[int, Results]] = {row: {} for row in plan.rows}
    runs = [(row, split) for row in plan.rows for split in range(plan.splits)]
    missing = [of_run for of_run in runs if not (plan.folder(*of_run) / RESULT).exists()]
    for row, split in runs:
        if (row, split) not in missing:
            results[row][split] = _result(plan, row, split)
    if len(missing) < len(runs):
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already")
    if missing:
        _check_weights(plan)
    started = time.perf_counter()
    for done, (row, split) in enumerate(missing):
        seconds = (time.perf_counter() - started) / max(done, 1) * (len(missing) - done)
        eta = f"ETA {timedelta(seconds=round(seconds))}" if done else "ETA after this one"
        line = f"run {len(runs) - len(missing) + done + 1} of {len(runs)}: {row}, split {split}; {eta}"
        say(line)
        results[row][split] = _result(plan, row, split)
        _write(plan, _content(plan, data, results))
    content = _content(plan, data, results)
    _write(plan, content)  # where nothing was missing but the table is of other rows
    return content


def _result(plan: _Plan, row: str, split: int) -> Results:
    try:
        return run(plan.run(row, split), pictures if plan.options.machine.pictures else None)
    except UserError as error:
        raise UserError(f"{row}, split {split}: {error}") from error


def _check_weights(plan: _Plan) -> None:
    """Raise where a backbone would start at random for want of the weights that its recipe names."""
    model = plan.options.recipe.model
    if model.weights == "imagenet":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is an error here
            if not make_backbone(model, identities=1).pretrained:
                raise UserError("weights: ImageNet's cannot be fetched here, wanted a file (--weights PATH) or random")


def _content(plan: _Plan, data: str, results: Mapping[str, Mapping[int, Results]]) -> dict[str, Any]:
    """What the table holds: the figures, and all that they are figures of."""
    options, scores = plan.options, plan.scores
    recipe = plan.run(plan.rows[-1], 0).settings.recipe
    of = next(run[-1] for runs in results.values() for run in runs.values())
    about = {
        "table": options.table,
        "dataset": plan.dataset,
        **{name: of[name] for name in ("protocol", "ties", "valid", "gallery", "junk")},
        **({"people": recipe.data.prid} if plan.dataset == "prid-2011" else {}),
        **(
            {"counts": "as published" if options.source.check_counts else "not checked"}
            if plan.dataset not in OTHERS
            else {}
        ),
        "preset": options.preset,
        "backbone": recipe.model.backbone,
        "ops": options.step.ops,
        "seed": recipe.seed,
        "splits": plan.splits,
        "epochs": recipe.epochs,
    }
    apart = diff_from_preset(recipe)
    told = f"but for {', '.join(apart)}" if apart else "as it is"
    notes = [
        NOTE.format(first=scores[0]),
        f"Asked for: {len(plan.rows)} of {len(_rows(options.table))} rows, split{'s' * (plan.splits > 1)} "
        f"{', '.join(map(str, range(plan.splits)))} of {SPLITS[plan.dataset]}, preset {options.preset} {told}. "
        f"Ended: {sum(map(len, results.values()))} of {len(plan.rows) * plan.splits} runs.",
        f"Data: {data}",
    ]
    environments = environments_of(plan.folder(row, split) for row, runs in results.items() for split in runs)
    notes += [f"Computed with {', '.join(f'{name} {value}' for name, value in e.items())}." for e in environments]
    if plan.dataset in OTHERS:
        notes.append(f"{plan.dataset} is not one of the paper's datasets: these figures compare with none of its.")
    elif apart or plan.splits < SPLITS[plan.dataset] or not options.source.check_counts:
        notes.append("This is not the paper's experiment in full: the differences do not tell how well it reproduces.")
    papers = {
        name: dict(zip(scores, paper_figures(name)[plan.dataset], strict=True)) if plan.dataset not in OTHERS else None
        for name in plan.rows
    }
    return {
        "title": f"Table {options.table} on {', '.join(f'{name} {value}' for name, value in list(about.items())[1:])}",
        **about,
        "rows": [compare(name, results[name], papers[name], scores) for name in plan.rows],
        "data": data,
        "recipe": flatten(recipe),  # of the last row; each run's own is in its folder
        "environments": environments,
        "notes": notes,
    }


def _write(plan: _Plan, content: Mapping[str, Any]) -> None:
    table = markdown(content["title"], content["rows"], plan.scores, content["notes"])
    try:
        write_atomic(plan.output / "table.md", table)
        write_atomic(plan.output / "table.json", json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output: {error}") from error


if __name__ == "__main__":
    run_command(lambda: reproduce(parse_options("python -m training.reproduce")))
