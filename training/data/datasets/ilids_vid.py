"""Read the iLIDS-VID layout: person folders under two cameras, and a MATLAB file of half-and-half splits."""

from __future__ import annotations

from pathlib import Path

from training.data.datasets.readers import (
    INCOMPLETE,
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

SEQUENCES = Path("i-LIDS-VID/sequences")
SPLITS = Path("train-test people splits/train_test_splits_ilidsvid.mat")
EXAMPLE = SEQUENCES / "cam1/person001/cam1_person001_00001.png"
CAMERAS = (1, 2)

# As published. As each row of the split file is a permutation, which is always checked, so many people give 300
# training tracklets, 150 queries and 150 in the gallery.
PEOPLE = 300
ROWS = 10
SHORTEST, LONGEST = 23, 192  # frames per tracklet


def load(root: Path, split: int, *, check_counts: bool = True) -> Split:
    """Read one split: the first half of its row is for testing, camera 1 against camera 2, the second for training.

    Args:
        root: the folder that holds `i-LIDS-VID/` (nested twice in some copies) and `train-test people splits/`.
        split: row of the split file, from 0.
        check_counts: require the published numbers of people, splits and frames.

    Raises:
        UserError: a path is missing, the cameras hold different people, a person has no frame, the split file does not
            fit the folders, or a count is not the published one.
    """
    outer = root / SEQUENCES.parts[0]
    wanted = f"a folder with {EXAMPLE} and {SPLITS}"
    sequences = first_folder(root / SEQUENCES, outer / SEQUENCES, wanted=wanted)
    splits = first_file(root / SPLITS, outer / SPLITS, wanted=wanted)
    rows = read_table(splits, "ls_set", "splits by people")
    people = _people(sequences)
    if check_counts:
        check_count(sequences, "person folders a camera", len(people), PEOPLE)
        check_count(splits, "splits", len(rows), ROWS)
    check_split(split, len(rows), f"the rows of {SPLITS.name}")
    test, train = split_in_half(people, rows[split], f"{splits}, split {split}")

    def read(camera: int, person: str) -> Tracklet:
        folder = sequences / f"cam{camera}" / person
        frames = numbered_frames(folder, EXAMPLE.name)
        if check_counts and not SHORTEST <= len(frames) <= LONGEST:
            raise UserError(f"{folder}: got {len(frames)} frames, wanted {SHORTEST} to {LONGEST}; {INCOMPLETE}")
        return Tracklet(int(person.removeprefix("person")), camera, frames, f"cam{camera}/{person}")

    return Split(
        train=tuple(read(camera, person) for person in train for camera in CAMERAS),
        query=tuple(read(1, person) for person in test),
        gallery=tuple(read(2, person) for person in test),
        protocol="single-shot",
        description=(
            f"iLIDS-VID layout in {root}, split {split} of {len(rows)}: {len(train)} people to train on "
            f"({len(train) * len(CAMERAS)} tracklets), {len(test)} other people held out, camera 1 against camera 2"
        ),
    )


def _people(sequences: Path) -> list[str]:
    """Return the sorted names of the person folders; raise unless both cameras have the same."""
    by_camera = []
    for camera in CAMERAS:
        folder = first_folder(sequences / f"cam{camera}", wanted=f"a folder like {EXAMPLE.parent}")
        by_camera.append(set(person_folders(folder, "person")))
    lone = sorted(by_camera[0] ^ by_camera[1])
    if lone:
        missing = sequences / ("cam2" if lone[0] in by_camera[0] else "cam1") / lone[0]
        raise UserError(f"{missing}: not found; wanted every person folder under both cameras ({len(lone)} are not)")
    return sorted(by_camera[0])
