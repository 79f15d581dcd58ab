"""Read people from a table: a .csv file with a row for each frame, or for each folder of frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from training.data.datasets.own_people import PARTS, Recording, make_split
from training.data.image_folder import images_in, is_image
from training.data.tracklets import Split
from training.runtime.errors import UserError

COLUMNS = ("path", "person", "camera", "tracklet", "part")
EXAMPLE = "path,person,camera,tracklet,part and anna/0001.png,anna,entrance,1,train"
READS_FILE = True


def load(root: Path, split: int) -> Split:
    """Read one split of a table; no image is opened.

    Its columns are path, person, camera, tracklet and part, in any order and case, between commas or semicolons;
    others are ignored. A path is that of a frame, or of a folder with the frames of a tracklet in natural order of
    their names; it is relative to the table's folder. Frames of one person, camera, tracklet and part are a tracklet,
    in the order of their rows. A tracklet may be empty where a camera saw a person once. The part is train, query or
    gallery, or empty in every row. See `training.data.datasets.own_people.make_split` for the splits.

    Args:
        root: the .csv file, UTF-8.
        split: the number of the split, from 0.

    Raises:
        UserError: the file is missing, a column is, a row is malformed, a path does not exist, or the split cannot be
            made.
    """
    if root.is_dir():
        raise UserError(f"{root}: got a folder, wanted a .csv file with the lines {EXAMPLE}")
    if not root.is_file():
        raise UserError(f"{root}: not found; wanted a .csv file with the lines {EXAMPLE}")
    frames: dict[tuple[str, str, str, str], list[Path]] = {}
    lines: dict[Path, int] = {}
    for line, row in _rows(root):
        where = f"{root}, line {line}"
        path, person, camera, tracklet, part = (row[column] for column in COLUMNS)
        if not path or not person or not camera:
            empty = next(column for column in COLUMNS if not row[column])
            raise UserError(f"{where}: got no {empty}, wanted a line as {EXAMPLE}")
        if part.lower() not in ("", *PARTS):
            raise UserError(f"{where}: got part {part!r}, wanted {', '.join(PARTS)}, or none in any line")
        for frame in _frames(root.parent / path, where):
            if (first := lines.setdefault(frame, line)) != line:
                raise UserError(f"{where}: {frame} is in line {first} already, wanted each frame once")
            frames.setdefault((part.lower(), person, camera, tracklet), []).append(frame)
    parts = {part for part, *_ in frames}
    if "" in parts and len(parts) > 1:
        raise UserError(f"{root}: got lines with a part and lines without, wanted all or none, as {EXAMPLE}")
    recordings = [
        Recording(part, person, camera, tuple(of_tracklet), "/".join(filter(None, (person, camera, tracklet))))
        for (part, person, camera, tracklet), of_tracklet in frames.items()
    ]
    if not recordings:
        raise UserError(f"{root}: got no line after the columns, wanted {EXAMPLE}")
    return make_split(recordings, split, f"people in {root}", EXAMPLE)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of a line and its columns by name, without spaces around them."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: got a file that is not UTF-8, wanted one, with the lines {EXAMPLE}") from None
    first = content.partition("\n")[0]
    rows = csv.reader(io.StringIO(content, newline=""), strict=True, delimiter=";" if ";" in first else ",")
    try:
        columns = [column.strip().lower() for column in next(rows, [])]
        if missing := [column for column in COLUMNS if column not in columns]:
            raise UserError(
                f"{path}: got no column {missing[0]} in {first.strip()[:200]!r}, wanted the lines {EXAMPLE}"
            )
        for row in rows:
            if row:
                values = [value.strip() for value in row] + [""] * len(columns)
                yield rows.line_num, dict(zip(columns, values, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}, wanted a line as {EXAMPLE}") from None


def _frames(path: Path, where: str) -> tuple[Path, ...]:
    if path.is_dir():
        images = images_in(path)
        if not images:
            raise UserError(f"{where}: got no image in {path}, wanted the frames of a tracklet")
        return images
    if not path.is_file():
        raise UserError(f"{where}: there is no {path}, wanted an image, or a folder of images")
    if not is_image(path):
        raise UserError(f"{where}: got {path}, wanted an image, or a folder of images")
    return (path,)
