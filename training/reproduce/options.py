"""Options of a table: those of its runs, and which of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from training.config.presets import PAPER
from training.config.recipe import Recipe
from training.config.step import StepConfig
from training.data import Dataset
from training.data.config import SourceConfig
from training.engine.options import Base, Machine, base_settings, parse_known, parse_over
from training.runtime.errors import UserError
from training.runtime.fields import flatten, update

# The paper's datasets that a table is of, its own first.
DATASETS: dict[int, tuple[Dataset, ...]] = {1: ("ilids-vid", "prid-2011"), 3: ("mars",)}


@dataclass(frozen=True)
class Options:
    """Train the rows of one of the paper's tables, each on the splits of a dataset, and compare with its figures.

    Table 1 has twelve rows, on iLIDS-VID or PRID-2011; table 3 has four of them, on MARS. Table 2 is not offered. On
    another dataset there are no figures of the paper's. The same command continues what was killed.
    """

    table: Literal[1, 3]
    """Number of the paper's table."""
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
    first = {name: given[name] for name in flatten(_First()) if name in given}
    return update(_base(update(_First(table), **first)), **given)


def _base(first: _First) -> Options:
    """Return the options that others are over: of the preset or a file, on the table's dataset."""
    base, dataset = Base(recipe=first.preset, config=first.config), DATASETS[first.table or 1][0]
    settings = base_settings(base, first.backbone, default="paper", dataset=dataset)
    recipe = settings.recipe
    if recipe.name not in ("paper", "official"):
        raise UserError(f"config: got recipe {recipe.name!r} in {first.config}, wanted paper or official")
    if settings.split:
        raise UserError(f"config: got split {settings.split} in {first.config}, wanted none: --splits is a table's")
    table = tyro.MISSING if first.table is None else first.table
    return Options(table, recipe.preset, config=first.config, recipe=recipe, source=settings.source, step=settings.step)
