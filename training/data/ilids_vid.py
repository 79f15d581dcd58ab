"""The iLIDS-VID layout: person folders under two cameras, and a MATLAB file of half-and-half splits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from training.data.tracklets import Split, Tracklet
from training.errors import UserError

SEQUENCES = Path("i-LIDS-VID/sequences")
SPLITS = Path("train-test people splits/train_test_splits_ilidsvid.mat")
EXAMPLE = SEQUENCES / "cam1/person001/cam1_person001_00001.png"
CAMERAS = (1, 2)


def load(root: Path, split: int) -> Split:
    """Read one split: the first half of its row is tested on, camera 1 against camera 2; the second is trained on.

    Args:
        root: the folder that holds `i-LIDS-VID/` (nested twice in some copies) and `train-test people splits/`.
        split: row of the split file, from 0.

    Raises:
        UserError: a path is missing, the cameras hold different people, a person has no frame, or the split file does
            not fit the folders.
    """
    outer = root / SEQUENCES.parts[0]
    sequences = _first_that_exists(root / SEQUENCES, outer / SEQUENCES)
    rows = _read_splits(_first_that_exists(root / SPLITS, outer / SPLITS))
    people = _people(sequences)
    if not 0 <= split < len(rows):
        raise UserError(f"split: got {split}, wanted 0 to {len(rows) - 1}, the rows of {SPLITS.name}")
    row = rows[split]
    if sorted(row) != list(range(1, len(people) + 1)):
        raise UserError(
            f"{SPLITS.name}, split {split}: got {len(row)} ordinals from {min(row)} to {max(row)}, "
            f"wanted each of 1 to {len(people)} once, as there are that many person folders"
        )
    ordered = [people[ordinal - 1] for ordinal in row]
    test, train = sorted(ordered[: len(row) // 2]), sorted(ordered[len(row) // 2 :])
    return Split(
        train=tuple(_read_tracklet(sequences, camera, person) for person in train for camera in CAMERAS),
        probe=tuple(_read_tracklet(sequences, 1, person) for person in test),
        gallery=tuple(_read_tracklet(sequences, 2, person) for person in test),
        protocol="single-shot",
        description=(
            f"iLIDS-VID layout in {root}, split {split} of {len(rows)}: {len(train)} people to train on "
            f"({len(train) * len(CAMERAS)} tracklets), {len(test)} other people held out, camera 1 against camera 2"
        ),
    )


def _first_that_exists(*paths: Path) -> Path:
    for path in paths:
        if path.exists():
            return path
    raise UserError(f"{paths[0]}: not found; wanted a folder with {EXAMPLE} and {SPLITS}")


def _people(sequences: Path) -> list[str]:
    """Return the names of the person folders, sorted, the same under both cameras."""
    found = []
    for camera in CAMERAS:
        folder = sequences / f"cam{camera}"
        if not folder.is_dir():
            raise UserError(f"{folder}: not found; wanted a folder like {EXAMPLE.parent}")
        found.append({path.name for path in folder.iterdir() if re.fullmatch(r"person\d+", path.name)})
    lone = sorted(found[0] ^ found[1])
    if lone:
        missing = sequences / ("cam2" if lone[0] in found[0] else "cam1") / lone[0]
        raise UserError(f"{missing}: not found; wanted every person folder under both cameras ({len(lone)} are not)")
    return sorted(found[0])


def _read_splits(path: Path) -> list[list[int]]:
    try:
        content = loadmat(path)
    except Exception as error:  # a damaged file has scipy raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable MATLAB file ({reason})") from None
    if "ls_set" not in content:
        raise UserError(f"{path}: no key ls_set; wanted an array of splits by people")
    rows = np.asarray(content["ls_set"])
    if rows.ndim != 2 or rows.size == 0 or rows.dtype.kind not in "iuf":
        raise UserError(f"{path}: ls_set has shape {rows.shape} of {rows.dtype}; wanted numbers, splits by people")
    if not np.all(np.isfinite(rows) & (rows == np.floor(rows))):
        raise UserError(f"{path}: ls_set has ordinals that are not whole; wanted a permutation of 1 to N in a row")
    return [[int(ordinal) for ordinal in row] for row in rows]


def _read_tracklet(sequences: Path, camera: int, person: str) -> Tracklet:
    folder = sequences / f"cam{camera}" / person
    numbered = []
    for path in folder.glob("[!.]*.png"):
        number = re.search(r"\d+$", path.stem)
        if number is None:
            raise UserError(f"{path}: no frame number; wanted a name like {EXAMPLE.name}")
        numbered.append((int(number[0]), path))
    if not numbered:
        raise UserError(f"{folder}: no frames; wanted images like {EXAMPLE.name}")
    return Tracklet(
        person=int(person.removeprefix("person")),
        camera=camera,
        frames=tuple(path for _, path in sorted(numbered)),
        name=f"cam{camera}/{person}",
    )
