"""The runs of a table: which rows on which splits, each with its options and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.config.settings import Settings
from training.config.table1 import FULL, ROWS, paper_figures
from training.data import Dataset
from training.engine.options import Options as RunOptions
from training.reproduce.options import DATASETS, Options
from training.runtime.errors import UserError
from training.runtime.fields import differing

SCORES = {1: ("rank-1", "rank-5", "rank-20"), 3: ("mAP", "rank-1", "rank-5", "rank-20")}  # a table's figures
OTHERS: tuple[Dataset, ...] = ("synthetic", "mot")  # without figures of the paper's
SPLITS: dict[Dataset, int] = {"ilids-vid": 10, "prid-2011": 10, "synthetic": 10, "mars": 1, "mot": 1}


@dataclass(frozen=True)
class Plan:
    """The runs of a table.

    options: of the command line.
    dataset: the one to train on.
    rows: names of the rows, in the table's order.
    splits: their number, from the first.
    output: folder of all the runs and of the table.
    """

    options: Options
    dataset: Dataset
    rows: list[str]
    splits: int
    output: Path

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the table's figures."""
        return SCORES[self.options.table]

    def folder(self, row: str, split: int) -> Path:
        """The folder of one run."""
        return self.output / row / f"split-{split}"

    def run(self, row: str, split: int) -> RunOptions:
        """The options of one run."""
        options = self.options
        settings = Settings(ROWS[row].apply(options.recipe), split, options.source, options.step)
        return RunOptions(settings=settings.absolute(), machine=options.machine, output=self.folder(row, split))


def make_plan(options: Options) -> Plan:
    """Return the runs that options ask for.

    Raises:
        UserError: the table has no such dataset, rows or splits, or an option is one that its rows set.
    """
    papers = DATASETS[options.table]
    dataset, known = options.recipe.data.dataset, (*papers, *OTHERS)
    if dataset not in known:
        raise UserError(f"dataset: got {dataset!r} for table {options.table}, wanted one of {', '.join(known)}")
    rows = rows_of(options.table)
    for name in options.rows:
        if name not in rows:
            raise UserError(f"rows: got {name!r}, wanted some of table {options.table}'s: {', '.join(rows)}")
    for option, (got, wanted) in differing(options.recipe, FULL.apply(options.recipe)).items():
        raise UserError(f"{option}: got {got!r}, wanted {wanted!r}: the rows of the table set it")
    splits = SPLITS[dataset] if options.splits is None else options.splits
    if splits < 1:
        raise UserError(f"splits: got {splits}, wanted at least 1")
    output = options.output or Path("runs") / f"reproduce-{dataset}-{options.preset}"
    return Plan(options, dataset, [row for row in rows if row in options.rows or not options.rows], splits, output)


def rows_of(table: int) -> list[str]:
    """Return the names of a table's rows, in its order."""
    return [name for name in ROWS if DATASETS[table][0] in paper_figures(name)]
