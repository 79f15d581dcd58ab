"""MARS: images named after person, camera, tracklet and frame, name lists of them, and tables of rows of the lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from training.data.layout import first_folder
from training.data.mars_tables import MIN_FRAMES, TEST, TRAIN, Tracks, read_tables
from training.data.tracklets import Split, Tracklet, people_of
from training.errors import NoSuchSplit, UserError

EXAMPLE = "bbox_train/0001/0001C1T0001F001.jpg"
FOLDER = re.compile(r"00-1|\d{4}")  # the first is the junk
NAME = re.compile(r"(?:00-1|\d{4})C\dT\d{4}F\d{3}\.jpg")  # person, camera, tracklet, frame: of one width, so it sorts


def load(root: Path, split: int, *, check_counts: bool = True) -> Split:
    """Read the one split; no image is opened, nor looked for where there is a name list.

    The gallery is every test tracklet but the junk of person -1, which no protocol counts: people, queries included,
    and distractors, who are person 0. The probes are the very objects that stand in the gallery.

    Args:
        root: the folder that holds `bbox_train/`, `bbox_test/` and `info/`; a name list missing from `info/` is rebuilt
            from the folders.
        split: 0.
        check_counts: whether people, tracklets, frames and queries must be as many as published.

    Raises:
        UserError: a path is missing, the names do not fit the tables, there is no such split, or a count is not the
            published one.
    """
    if split != 0:
        raise NoSuchSplit(f"split: got {split}, wanted 0, the only split of MARS")
    layout = f"a folder with {EXAMPLE}, bbox_test/ beside bbox_train/, and info/{TRAIN}"
    images = [first_folder(root / f"bbox_{part}", wanted=layout) for part in ("train", "test")]
    info = first_folder(root / "info", wanted=layout)
    tables = read_tables(info, check_counts=check_counts)
    lists = [info / "train_name.txt", info / "test_name.txt"]
    rebuilt = [path.name for path in lists if not path.is_file()]
    train_names = _names(lists[0], images[0], int(tables.train.end.max()), TRAIN)
    test_names = _names(lists[1], images[1], int(tables.test.end.max()), TEST)

    long = np.flatnonzero(tables.train.lengths >= MIN_FRAMES)
    train = tuple(_tracklets(images[0], train_names, tables.train, long))
    gallery = tuple(_tracklets(images[1], test_names, tables.test, tables.gallery))
    at_row = dict(zip(tables.gallery.tolist(), gallery, strict=True))
    probe = tuple(at_row[row] for row in tables.query.tolist())
    return Split(
        train,
        probe,
        gallery,
        protocol="mars-official",
        description=(
            f"MARS layout in {root}: {len(people_of(train))} people to train on ({len(train)} tracklets, "
            f"{len(tables.train.start) - len(train)} under {MIN_FRAMES} frames dropped), {len(people_of(probe))} other "
            f"people held out, {len(probe)} queries in a gallery of {len(gallery)} that they are part of, "
            f"{len(tables.test.start) - len(gallery)} junk tracklets left out"
            + (f"; {' and '.join(rebuilt)} rebuilt from the folders" if rebuilt else "")
        ),
    )


def _names(path: Path, images: Path, rows: int, table: str) -> list[str]:
    """Read a name list, or rebuild it; its rows are what the table's `rows` rows count."""
    if path.is_file():
        names = path.read_text(encoding="utf-8-sig", errors="replace").split()
        if len(names) != rows:
            raise UserError(f"{path}: got {len(names)} names, wanted {rows}, as {table} says; copy it again")
        return names
    folders = sorted(folder for folder in images.iterdir() if FOLDER.fullmatch(folder.name))
    names = []
    for folder in folders:
        names += sorted(image.name for image in folder.iterdir() if NAME.fullmatch(image.name))
    if len(names) != rows:  # one image too many or too few would shift every later row
        raise UserError(
            f"{images}: got {len(names)} images like {EXAMPLE}, wanted {rows}, as {table} says; "
            f"copy the images again, or put {path.name} into info/"
        )
    return names


def _tracklets(images: Path, names: list[str], tracks: Tracks, rows: Iterable[int]) -> Iterable[Tracklet]:
    """Make the tracklets of some rows of a table."""
    for row in rows:
        start, end, person, camera = (
            int(column[row]) for column in (tracks.start, tracks.end, tracks.person, tracks.camera)
        )
        frames = sorted(names[start:end])
        prefix = f"{person:04d}C{camera}T"
        for name in frames:
            if not name.startswith(prefix) or not NAME.fullmatch(name):
                raise UserError(
                    f"{images}, tracklet {row + 1}: got the name {name!r} in rows {start + 1} to {end}, wanted names "
                    f"like {prefix}0001F001.jpg; copy the name list again, or remove it to have it rebuilt"
                )
        folder = images / prefix[:4]
        yield Tracklet(person, camera, tuple(folder / name for name in frames), f"{images.name}/{frames[0][:11]}")
