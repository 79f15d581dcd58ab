"""Read the PRID-2011 multi-shot layout: person folders under two cameras, and two protocols.

`official-27`: people with at least 27 frames under both cameras, split by the MATLAB file of the iLIDS-VID archive.
`paper-21`: people with more than 21 frames under both, in random halves or as in torchreid's `splits_prid2011.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np

from training.data import PridPeople
from training.data.datasets.readers import (
    check_count,
    check_split,
    first_file,
    first_folder,
    numbered_frames,
    person_folders,
    read_table,
    split_in_half,
)
from training.data.tracklets import Split, Tracklet
from training.runtime.errors import UserError

MULTI_SHOT = Path("prid_2011/multi_shot")
CAMERAS = ("cam_a", "cam_b")
EXAMPLE = MULTI_SHOT / "cam_a/person_0001/0001.png"
MATLAB_SPLITS = "train_test_splits_prid.mat"
ILIDS_FOLDER = "train-test people splits"  # folder of that file in the iLIDS-VID archive
JSON_SPLITS = "splits_prid2011.json"

COMMON = 200  # the folders 1 to 200 show the same people under both cameras; from 201 on, equal numbers mean nothing
LEAST_FRAMES: dict[PridPeople, int] = {"paper-21": 22, "official-27": 27}
OFFICIAL_PEOPLE = 178
SPLITS = 10
SEED = 2011  # of the random halves

People = dict[str, tuple[Tracklet, Tracklet]]  # by person folder, the tracklets of the two cameras


def load(root: Path, split: int, *, prid: PridPeople = "paper-21", check_counts: bool = True) -> Split:
    """Read one split, camera a against camera b.

    Args:
        root: the folder that holds `prid_2011/` and the split file: `train_test_splits_prid.mat`, also inside
            `train-test people splits/`, for official-27; optionally `splits_prid2011.json` for paper-21.
        split: the number of the split, from 0.
        prid: the protocol.
        check_counts: require the published numbers of people and splits.

    Raises:
        UserError: a path is missing, a person has no frame, the split file does not fit the folders, there is no such
            split, or a count is not the published one.
    """
    if prid not in get_args(PridPeople):
        raise UserError(f"prid: got {prid!r}, wanted one of {', '.join(get_args(PridPeople))}")
    everyone = _read_people(root, check_counts)
    least = LEAST_FRAMES[prid]
    people = {name: pair for name, pair in everyone.items() if min(len(t.frames) for t in pair) >= least}
    if len(people) < 2:
        raise UserError(
            f"{root / MULTI_SHOT}: got {len(people)} people with {least} frames or more under both cameras, "
            f"wanted at least 2; copy the dataset again"
        )
    if prid == "official-27":
        test, train, source = _official_split(root, split, list(people), check_counts)
    elif (root / JSON_SPLITS).is_file():
        test, train, source = _torchreid_split(root / JSON_SPLITS, split, people)
    else:
        test, train, source = _random_split(split, list(people))
    return Split(
        train=tuple(tracklet for person in train for tracklet in people[person]),
        query=tuple(people[person][0] for person in test),
        gallery=tuple(people[person][1] for person in test),
        protocol="single-shot",
        description=(
            f"PRID-2011 layout in {root}, {prid} (people with {least} frames or more under both cameras: {len(people)} "
            f"of {len(everyone)}), {source}: {len(train)} people to train on ({2 * len(train)} tracklets), {len(test)} "
            f"other people held out, camera a against camera b"
        ),
    )


def _read_people(root: Path, check_counts: bool) -> People:
    """Return the tracklets of the people that both cameras saw, sorted by the names of their folders."""
    by_camera = []
    for camera in CAMERAS:
        folder = first_folder(root / MULTI_SHOT / camera, wanted=f"a folder with {EXAMPLE}, and cam_b next to cam_a")
        names = {name for name, number in person_folders(folder, "person_").items() if number <= COMMON}
        if check_counts:
            check_count(folder, f"person folders with numbers up to {COMMON}", len(names), COMMON)
        by_camera.append(names)

    def read(number: int, name: str) -> Tracklet:
        camera = CAMERAS[number - 1]
        frames = numbered_frames(root / MULTI_SHOT / camera / name, EXAMPLE.name)
        return Tracklet(int(name.removeprefix("person_")), number, frames, f"{camera}/{name}")

    return {name: (read(1, name), read(2, name)) for name in sorted(by_camera[0] & by_camera[1])}


def _official_split(root: Path, split: int, people: list[str], check_counts: bool) -> tuple[list[str], list[str], str]:
    path = first_file(
        root / MATLAB_SPLITS,
        root / ILIDS_FOLDER / MATLAB_SPLITS,
        wanted=f"it there or in {ILIDS_FOLDER}/: it comes with the iLIDS-VID archive (paper-21 does without)",
    )
    rows = read_table(path, "ls_set", "splits by people")
    if check_counts:
        check_count(root / MULTI_SHOT, "people with 27 frames or more under both cameras", len(people), OFFICIAL_PEOPLE)
        check_count(path, "splits", len(rows), SPLITS)
    check_split(split, len(rows), f"the rows of {path.name}")
    test, train = split_in_half(people, rows[split], f"{path}, split {split}")
    return test, train, f"split {split} of {len(rows)} in {path.name}"


def _torchreid_split(path: Path, split: int, people: People) -> tuple[list[str], list[str], str]:
    try:
        splits = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); copy it again, or remove it for random halves") from None
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{path}: got no list of splits, wanted [{{'train': [folder, ...], 'test': [...]}}, ...]")
    check_split(split, len(splits), f"the splits of {path.name}")

    def folders(part: str) -> list[str]:
        names = splits[split].get(part) if isinstance(splits[split], dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}, split {split}: got no list of folder names as {part!r}, wanted one")
        return sorted(names)

    test, train = folders("test"), folders("train")
    names = test + train
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}, split {split}: {twice[0]} is named twice, wanted each person once")
    absent = sorted(set(names) - set(people))
    if absent:
        raise UserError(
            f"{path}, split {split}: {absent[0]} is not a folder with {LEAST_FRAMES['paper-21']} frames or more under "
            f"both cameras ({len(absent)} such); copy the dataset again"
        )
    return test, train, f"split {split} of {len(splits)} in {path.name}"


def _random_split(split: int, people: list[str]) -> tuple[list[str], list[str], str]:
    check_split(split, SPLITS, "the random halves")
    ordinals = np.random.default_rng((SEED, split)).permutation(len(people)) + 1
    test, train = split_in_half(people, ordinals, f"split {split}")
    return test, train, f"random halves {split} of {SPLITS} (seed {SEED})"
