"""Datasets, read into tracklets, and the loader that turns those into batches; a dataset's module has its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from training.data.tracklets import Split
from training.errors import UserError

Dataset: TypeAlias = Literal["synthetic", "mot", "ilids-vid", "prid-2011", "mars"]
PridPeople: TypeAlias = Literal["paper-21", "official-27"]
DATASETS: tuple[str, ...] = get_args(Dataset)


def load_split(
    dataset: str, root: Path | None, split: int, *, prid: PridPeople = "paper-21", check_counts: bool = True
) -> Split:
    """Read one split of a dataset.

    Args:
        dataset: one of `DATASETS`.
        root: the dataset's folder; None for the dataset's default, where it has one.
        split: which split, from 0.
        prid: which of PRID-2011's people.
        check_counts: whether a set that lacks some of what was published is an error.

    Raises:
        UserError: the name is unknown, no folder was given, or what it holds does not make a dataset.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset: got {dataset!r}, wanted one of {', '.join(DATASETS)}")
    module = import_module(f"training.data.{dataset.replace('-', '_')}")
    root = root or getattr(module, "DEFAULT_ROOT", None)
    if root is None:
        raise UserError(f"dataset {dataset}: got no data root, wanted the folder that holds it")
    result: Split = module.load(root, split)
    return result
