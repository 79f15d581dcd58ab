"""Datasets, read into tracklets, and the loader that turns those into batches; a dataset's module has its name."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from training.data.tracklets import Split
from training.errors import UserError

Dataset: TypeAlias = Literal["synthetic", "mot", "ilids-vid", "prid-2011", "mars"]
DATASETS: tuple[str, ...] = get_args(Dataset)

PridPeople: TypeAlias = Literal["paper-21", "official-27"]
"""Who counts in PRID-2011, and how they are split: see `training.data.prid_2011`."""


def load_split(
    dataset: str, root: Path | None, split: int, *, prid: PridPeople = "paper-21", check_counts: bool = True
) -> Split:
    """Read one split of a dataset.

    Args:
        dataset: one of `DATASETS`.
        root: the dataset's folder; None for the dataset's default, where it has one.
        split: which split, from 0.
        prid: who counts in PRID-2011; the other datasets do not ask.
        check_counts: whether iLIDS-VID, PRID-2011 and MARS must hold as much as published.

    Raises:
        UserError: the name is unknown, no folder was given, or what it holds does not make a dataset.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset: got {dataset!r}, wanted one of {', '.join(DATASETS)}")
    module = import_module(f"training.data.{dataset.replace('-', '_')}")
    root = root or getattr(module, "DEFAULT_ROOT", None)
    if root is None:
        raise UserError(f"dataset {dataset}: got no data root, wanted the folder that holds it")
    asked = {"prid": prid, "check_counts": check_counts}
    known = signature(module.load).parameters
    try:
        result: Split = module.load(root, split, **{name: value for name, value in asked.items() if name in known})
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise UserError(f"dataset {dataset}: {error}; wanted a data root that can be read") from error
    return result
