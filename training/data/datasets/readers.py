"""Shared by the dataset readers: paths, published counts, MATLAB tables, numbered frames, half-and-half splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from training.runtime.errors import NoSuchSplit, UserError

Ints = NDArray[np.int64]
INCOMPLETE = "copy the dataset again, or read a part of it with --no-check-counts"
"""Remedy for a copy with counts other than the published, for messages."""


def first_folder(*paths: Path, wanted: str) -> Path:
    """Return the first of `paths` that is a folder.

    Raises:
        UserError: none is; it names the first and gives `wanted`.
    """
    return _first(filter(Path.is_dir, paths), paths[0], wanted)


def first_file(*paths: Path, wanted: str) -> Path:
    """Return the first of `paths` that is a file.

    Raises:
        UserError: none is; it names the first and gives `wanted`.
    """
    return _first(filter(Path.is_file, paths), paths[0], wanted)


def _first(found: Iterator[Path], missing: Path, wanted: str) -> Path:
    for path in found:
        return path
    raise UserError(f"{missing}: not found; wanted {wanted}")


def check_count(place: Path | str, what: str, got: int, wanted: int) -> None:
    """Raise unless a count is the published one.

    Args:
        place: the folder or file that was counted.
        what: the things counted, in the plural.
        got: the count.
        wanted: the published count.

    Raises:
        UserError: they differ; it says how to read a part of the dataset.
    """
    if got != wanted:
        raise UserError(f"{place}: got {got} {what}, wanted {wanted}; {INCOMPLETE}")


def check_split(split: int, count: int, what: str) -> None:
    """Raise unless there is such a split.

    Args:
        split: the split asked for, from 0.
        count: the number of splits.
        what: a description of the splits, for messages, e.g. "the rows of splits.mat".

    Raises:
        NoSuchSplit: it is out of range.
    """
    if not 0 <= split < count:
        raise NoSuchSplit(f"split: got {split}, wanted 0 to {count - 1}, {what}")


def read_table(path: Path, key: str, layout: str) -> Ints:
    """Read a table of whole numbers from a MATLAB file.

    Args:
        path: a file that exists.
        key: the variable.
        layout: a description of its rows and columns, for messages, e.g. "splits by people".

    Returns:
        (rows, columns), neither of them 0.

    Raises:
        UserError: the file cannot be read, or does not hold such a table.
    """
    try:
        content = loadmat(path)
    except Exception as error:  # scipy raises anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable MATLAB file ({reason}); copy it again") from None
    if key not in content:
        raise UserError(f"{path}: no key {key}; wanted an array of {layout}")
    table = np.asarray(content[key])
    if table.ndim != 2 or table.size == 0 or table.dtype.kind not in "iuf":
        raise UserError(f"{path}: {key} has shape {table.shape} of {table.dtype}; wanted numbers, {layout}")
    if table.dtype.kind == "f" and not np.all(table == np.floor(table)):  # refuses NaN too
        raise UserError(f"{path}: {key} has numbers that are not whole; wanted {layout}, all whole")
    inexact = ~_exact_in_int64(table)
    if inexact.any():
        got = table[inexact][0]
        raise UserError(f"{path}: {key} has the number {got} of {table.dtype}; wanted {layout}, exact and within int64")
    return table.astype(np.int64)


def _exact_in_int64(table: np.ndarray) -> NDArray[np.bool_]:
    """Return a mask of the numbers that fit int64 and cannot have been rounded."""
    if table.dtype.kind == "f":
        return np.asarray(np.abs(table) < 2.0 ** (np.finfo(table.dtype).nmant + 1))
    return np.asarray(table <= np.iinfo(np.int64).max)


def numbered_frames(folder: Path, example: str) -> tuple[Path, ...]:
    """List the .png files of a folder in order of the numbers at the end of their names.

    Args:
        folder: the folder of one tracklet.
        example: the name of a frame, for messages.

    Raises:
        UserError: there is none, or one has no number.
    """
    numbered = []
    for path in folder.glob("[!.]*.png"):
        number = re.search(r"[0-9]+\Z", path.stem)
        if number is None:
            raise UserError(f"{path}: no frame number; wanted a name like {example}")
        numbered.append((int(number[0]), path))
    if not numbered:
        raise UserError(f"{folder}: no frames; wanted images like {example}")
    return tuple(path for _, path in sorted(numbered))


def person_folders(folder: Path, prefix: str) -> dict[str, int]:
    """Map the names of the person folders to the number after the prefix, sorted by name.

    Raises:
        UserError: two have the same number.
    """
    names = sorted(path.name for path in folder.iterdir() if re.fullmatch(f"{prefix}[0-9]+", path.name))
    by_number: dict[int, str] = {}
    for name in names:
        number = int(name.removeprefix(prefix))
        first = by_number.setdefault(number, name)
        if first != name:
            raise UserError(f"{folder}: {first} and {name} are both person {number}, wanted one")
    return {name: number for number, name in by_number.items()}


def split_in_half(people: list[str], ordinals: Iterable[int], source: str) -> tuple[list[str], list[str]]:
    """Split people by a row of ordinals: the first half to test on, the second to train on.

    Args:
        people: names, which the ordinals index from 1.
        ordinals: a permutation of 1 to the number of people.
        source: the origin of the ordinals, for messages.

    Returns:
        The names to test on and those to train on, each sorted.

    Raises:
        UserError: the ordinals are not a permutation.
    """
    row = [int(ordinal) for ordinal in ordinals]
    if sorted(row) != list(range(1, len(people) + 1)):
        raise UserError(
            f"{source}: got {len(row)} ordinals from {min(row)} to {max(row)}, "
            f"wanted each of 1 to {len(people)} once, as there are that many people; "
            "copy again whichever is incomplete"
        )
    ordered = [people[ordinal - 1] for ordinal in row]
    return sorted(ordered[: len(row) // 2]), sorted(ordered[len(row) // 2 :])
