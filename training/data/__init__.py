"""Datasets, read into tracklets, and the loader that turns tracklets into batches."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

from training.data.datasets import packed
from training.data.pack_file import is_pack
from training.data.tracklets import Split
from training.runtime.errors import UserError

Dataset: TypeAlias = Literal["synthetic", "mot", "ilids-vid", "prid-2011", "mars", "folder", "csv"]
DATASETS: tuple[str, ...] = get_args(Dataset)

PridPeople: TypeAlias = Literal["paper-21", "official-27"]
"""Protocols of PRID-2011: which people take part and how they are split, see `training.data.datasets.prid_2011`."""


def load_split(
    dataset: str, root: Path | None, split: int, *, prid: PridPeople = "paper-21", check_counts: bool = True
) -> Split:
    """Read one split of a dataset.

    Args:
        dataset: one of `DATASETS`.
        root: the dataset's folder or .csv file, or a file that `training.pack` made of it; None for the dataset's
            default, if it has one.
        split: the number of the split, from 0.
        prid: the protocol of PRID-2011; ignored by other datasets.
        check_counts: require the published counts of iLIDS-VID, PRID-2011 and MARS.

    Raises:
        UserError: the name is unknown, no folder was given, or the folder does not hold the dataset.
    """
    module = _reader_module(dataset)
    root = root or getattr(module, "DEFAULT_ROOT", None)
    if root is None:
        raise UserError(f"dataset {dataset}: got no data root, wanted the folder that holds it")
    options = reader_options(dataset, prid=prid, check_counts=check_counts)
    try:
        if root.suffix == ".pack" and not root.exists():
            raise UserError(f"{root}: no such file; wanted what python -m training.pack makes, or a dataset's folder")
        if is_packed(dataset, root):
            return packed.load(root, dataset, split, options)
        result: Split = module.load(root, split, **options)
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise UserError(f"dataset {dataset}: {error}; wanted a data root that can be read") from error
    return result


def is_packed(dataset: str, root: Path) -> bool:
    """Return True if `root` is to be read as a packed dataset: a file, unless the dataset's own reader reads files."""
    return root.is_file() and (is_pack(root) or not getattr(_reader_module(dataset), "READS_FILE", False))


def reader_options(dataset: str, **options: Any) -> dict[str, Any]:
    """Return the subset of `options` that a dataset's reader takes."""
    known = signature(_reader_module(dataset).load).parameters
    return {name: value for name, value in options.items() if name in known}


def _reader_module(dataset: str) -> ModuleType:
    if dataset not in DATASETS:
        raise UserError(f"dataset: got {dataset!r}, wanted one of {', '.join(DATASETS)}")
    return import_module(f"training.data.datasets.{dataset.replace('-', '_')}")
