"""Read MARS: images named by person, camera, tracklet and frame, lists of their names, and tables of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from training.data.datasets.mars_tables import MIN_FRAMES, TEST, TRAIN, Tracks, read_tables
from training.data.tracklets import Split, Tracklet, people_of
from training.runtime.errors import NoSuchSplit, UserError

EXAMPLE = "bbox_train/0001/0001C1T0001F001.jpg"
FOLDER = re.compile("00-1|[0-9]{4}")  # the first is the junk
# Person, camera, tracklet, frame: of fixed width, so names sort in order of time.
NAME = re.compile(r"(?:00-1|[0-9]{4})C[0-9]T[0-9]{4}F[0-9]{3}\.jpg")
# The last two are the folder of the repository's archive, and of a clone.
INFO = ("info", "info/info", "MARS-evaluation-master/info", "MARS-evaluation/info")


def load(root: Path, split: int, *, check_counts: bool = True) -> Split:
    """Read the one split; no image is opened, and with a name list none is even listed.

    The gallery is every test tracklet except junk (person -1), which no protocol counts: people, queries included, and
    distractors (person 0). The queries are elements of the gallery, the same objects.

    Args:
        root: the folder that holds `bbox_train/`, `bbox_test/` and `info/`, each of which may be nested in a folder of
            its own name; `info/` may also be in the MARS-evaluation repository's folder. A name list missing from
            `info/` is rebuilt from the folders.
        split: 0.
        check_counts: require the published numbers of people, tracklets, frames and queries.

    Raises:
        UserError: a path is missing, the names do not fit the tables, there is no such split, or a count is not the
            published one.
    """
    if split != 0:
        raise NoSuchSplit(f"split: got {split}, wanted 0, the only split of MARS")
    images = [_image_folder(root, "bbox_train"), _image_folder(root, "bbox_test")]
    info = _info_folder(root)
    tables = read_tables(info, check_counts=check_counts)
    lists = [info / "train_name.txt", info / "test_name.txt"]
    rebuilt = [path.name for path in lists if not path.is_file()]
    train_names = _read_names(lists[0], images[0], int(tables.train.end.max()), TRAIN)
    test_names = _read_names(lists[1], images[1], int(tables.test.end.max()), TEST)

    long = np.flatnonzero(tables.train.lengths >= MIN_FRAMES)
    train = tuple(_tracklets(images[0], train_names, tables.train, long))
    gallery = tuple(_tracklets(images[1], test_names, tables.test, tables.gallery))
    at_row = dict(zip(tables.gallery.tolist(), gallery, strict=True))
    query = tuple(at_row[row] for row in tables.query.tolist())
    return Split(
        train,
        query,
        gallery,
        protocol="mars-official",
        description=(
            f"MARS layout in {root}: {len(people_of(train))} people to train on ({len(train)} tracklets, "
            f"{len(tables.train.start) - len(train)} under {MIN_FRAMES} frames dropped), {len(people_of(query))} other "
            f"people held out, {len(query)} queries in a gallery of {len(gallery)} that they are part of, "
            f"{len(tables.test.start) - len(gallery)} junk tracklets left out"
            + (f"; {' and '.join(rebuilt)} rebuilt from the folders" if rebuilt else "")
        ),
    )


def _image_folder(root: Path, name: str) -> Path:
    """Find the folder that holds the person folders."""
    outer = root / name
    if not outer.is_dir():
        raise _not_found_error(root, name)
    inner = outer / name
    if _has_people(outer):
        if inner.is_dir() and _has_people(inner):
            raise UserError(f"{outer}: got folders like 0001/ both in it and in {inner}, wanted them in one")
        return outer
    holders = [folder for folder in sorted(outer.iterdir()) if folder.is_dir() and _has_people(folder)]
    if holders and holders != [inner]:
        found = " and ".join(map(str, holders[:2]))
        raise UserError(f"{outer}: got folders like 0001/ in {found}, wanted {EXAMPLE}; move them to {outer}")
    return holders[0] if holders else outer  # with a name list, images may be absent until they are read


def _has_people(folder: Path) -> bool:
    return any(FOLDER.fullmatch(path.name) and path.is_dir() for path in folder.iterdir())


def _info_folder(root: Path) -> Path:
    """Find the folder of the tables, or one that should have them."""
    folders = [root / name for name in INFO if (root / name).is_dir()]
    for folder in folders:
        if (folder / TRAIN).is_file():
            return folder
    if not folders:
        raise _not_found_error(root, "info")
    return folders[0]


def _not_found_error(root: Path, name: str) -> UserError:
    """Make the error for a folder missing from `root`; it names a folder above or below `root` that has it."""
    place = root / name
    candidates = (root.parent / name, *sorted(root.glob(f"*/{name}")), *sorted(root.glob(f"*/*/{name}")))
    for found in filter(Path.is_dir, candidates):
        if "__MACOSX" in found.parts:  # left by an archive: it has the folders but no images
            continue
        is_root = (found.parent / "bbox_train").is_dir() and (found.parent / "bbox_test").is_dir()
        remedy = f"pass --data-root {found.parent}" if is_root else f"move it to {place}"
        return UserError(f"{place}: not found, but {found} is; {remedy}")
    return UserError(
        f"{place}: not found; wanted a folder with {EXAMPLE}, bbox_test/ next to bbox_train/, and info/{TRAIN}"
    )


def _read_names(path: Path, images: Path, rows: int, table: str) -> list[str]:
    """Read a name list, or rebuild it from the folders; raise unless it has as many rows as the table refers to."""
    if path.is_file():
        names = path.read_text(encoding="utf-8-sig", errors="replace").split()
        if len(names) != rows:
            raise UserError(f"{path}: got {len(names)} names, wanted {rows}, as {table} says; copy it again")
        return names
    folders = sorted(folder for folder in images.iterdir() if FOLDER.fullmatch(folder.name))
    if not folders:
        raise UserError(f"{images}: got no folder like 0001/, wanted {rows} images like {EXAMPLE}, as {table} says")
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
    """Make the tracklets of the given rows of a table."""
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
