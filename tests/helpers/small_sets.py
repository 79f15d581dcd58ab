"""Small datasets on disk, each in the layout its authors distribute; a frame's color encodes person and camera."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

ILIDS_PEOPLE = (1, 2, 4, 319)  # gaps in the numbers, as in the real set
ILIDS_SPLITS = Path("train-test people splits/train_test_splits_ilidsvid.mat")

# Frames of each person under camera a and camera b. Person 5 is in neither protocol, 2 in paper-21 alone; the two 201
# are different people.
PRID_FRAMES = {1: (27, 30), 2: (22, 40), 3: (28, 27), 5: (50, 21), 7: (29, 27), 200: (27, 28), 201: (30, 30)}
PRID_SPLITS = Path("train_test_splits_prid.mat")

# Person, camera and frames of each tracklet, in the order of the tables.
MARS_TRAIN = ((1, 1, 8), (1, 2, 3), (1, 2, 9), (3, 1, 8), (3, 4, 10), (12, 2, 7), (12, 5, 8), (12, 6, 12))
MARS_TEST = ((-1, 1, 2), (-1, 3, 9), (0, 2, 3), (2, 1, 4), (2, 1, 5), (2, 3, 2), (11, 2, 3), (11, 5, 4))
MARS_QUERY = (4, 6, 7, 8)  # rows of MARS_TEST, from 1


def write_ilids(root: Path) -> Path:
    """Write four people, three frames each, and two splits; frame f of person p at camera c is all (p % 256, c, f)."""
    for camera in (1, 2):
        for person in ILIDS_PEOPLE:
            folder = root / f"i-LIDS-VID/sequences/cam{camera}/person{person:03d}"
            folder.mkdir(parents=True)
            for frame in (9, 10, 101):  # in order as numbers, not as strings
                image = Image.new("RGB", (6, 8), (person % 256, camera, frame))
                image.save(folder / f"cam{camera}_person{person:03d}_{frame}.png")
    (root / ILIDS_SPLITS).parent.mkdir()
    savemat(root / ILIDS_SPLITS, {"ls_set": np.array([[4, 1, 3, 2], [2, 3, 1, 4]])})
    return root


def write_prid(root: Path) -> Path:
    """Write the people of PRID_FRAMES and two official splits; frame f of person p at camera c is all (p, c, f)."""
    for number, camera in enumerate("ab", start=1):
        for person, frames in PRID_FRAMES.items():
            folder = root / f"prid_2011/multi_shot/cam_{camera}/person_{person:04d}"
            folder.mkdir(parents=True)
            for frame in range(1, frames[number - 1] + 1):
                Image.new("RGB", (6, 8), (person, number, frame)).save(folder / f"{frame:04d}.png")
    savemat(root / PRID_SPLITS, {"ls_set": np.array([[4, 1, 3, 2], [2, 3, 1, 4]])})  # of 1, 3, 7 and 200
    return root


def write_mars(root: Path, name_lists: bool = True, train: Sequence[tuple[int, int, int]] = MARS_TRAIN) -> Path:
    """Write test tracklets, training tracklets, queries, and name lists with CRLF like the real ones.

    Frame f of tracklet t of person p at camera c is about (5 p, 20 c + t, 10 f): JPEG rounds.
    """
    info = root / "info"
    info.mkdir(parents=True)
    for part, tracklets in (("train", train), ("test", MARS_TEST)):
        names: list[str] = []
        rows = []
        seen: Counter[tuple[int, int]] = Counter()
        for person, camera, frames in tracklets:
            seen[person, camera] += 1
            who = "00-1" if person == -1 else f"{person:04d}"
            folder = root / f"bbox_{part}" / who
            folder.mkdir(parents=True, exist_ok=True)
            rows.append((len(names) + 1, len(names) + frames, person, camera))
            for frame in range(1, frames + 1):
                names.append(f"{who}C{camera}T{seen[person, camera]:04d}F{frame:03d}.jpg")
                color = (5 * max(person, 0), 20 * camera + seen[person, camera], 10 * frame)
                Image.new("RGB", (8, 16), color).save(folder / names[-1], quality=95)
        savemat(info / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(rows, dtype=np.int32)})
        if name_lists:
            (info / f"{part}_name.txt").write_bytes("".join(f"{name}\r\n" for name in names).encode())
    savemat(info / "query_IDX.mat", {"query_IDX": np.array([MARS_QUERY], dtype=np.uint16)})
    return root
