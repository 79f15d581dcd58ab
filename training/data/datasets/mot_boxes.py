"""Parse boxes as MOTChallenge writes them, and leave out all but those of people with an identity."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import ceil, floor, isfinite
from pathlib import Path

import numpy as np

from training.runtime.errors import UserError

PEDESTRIAN = 1  # the class, in MOT16 and later
NO_IDENTITY = -1  # the track of a detection
NO_CLASS = -1
_MAX_CLASS = 99
_WORLD_COLUMNS = 10  # with as many, the eighth may be a world coordinate
COLUMNS = "frame,track,left,top,width,height,confidence"
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_INT64 = 2**63


@dataclass(frozen=True)
class Box:
    """Bounding box of a track in one frame, in pixels; left and top count from 1, as in MOTChallenge."""

    track: int
    left: float
    top: float
    width: float
    height: float

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Copy the part of an (h, w, 3) image that is inside the box; it may be empty."""
        rows = slice(max(floor(self.top - 1), 0), max(ceil(self.top - 1 + self.height), 0))
        columns = slice(max(floor(self.left - 1), 0), max(ceil(self.left - 1 + self.width), 0))
        return np.array(image[rows, columns], order="C")


@dataclass(frozen=True)
class _Line:
    """A parsed line of gt.txt.

    Args:
        where: file and line number, for messages.
        frame: from 1.
        box: bounding box of the track.
        label: column 8 if it is a whole number: a class, or a world coordinate.
        world: True if there are so many columns that the eighth may be a world coordinate.
    """

    where: str
    frame: int
    box: Box
    label: int | None
    world: bool


def parse_int64(text: str) -> int | None:
    """Parse a whole number exactly, also one written `12.0` or `1.2e1`.

    Returns:
        None if it is not a whole number, or is beyond int64.
    """
    if not _NUMBER.fullmatch(text.strip()):  # Decimal also takes underscores and digits of other scripts
        return None
    try:
        value = Decimal(text.strip())
    except InvalidOperation:  # an exponent that Decimal cannot hold
        return None
    # The range first: converting a number with a large exponent to int would exhaust memory.
    return int(value) if -_INT64 <= value < _INT64 and value == value.to_integral_value() else None


def boxes_file(root: Path) -> Path:
    """Return gt/gt.txt or gt.txt of a sequence's folder.

    Raises:
        UserError: there is neither.
    """
    for path in (root / "gt" / "gt.txt", root / "gt.txt"):
        if path.is_file():
            return path
    raise UserError(f"{root / 'gt.txt'}: not found, nor gt/gt.txt in the same folder")


def read_boxes(
    path: Path, length: int | None, *, identified: bool = True
) -> tuple[dict[int, list[Box]], tuple[str, ...]]:
    """Read a file of one box per line: frame,track,left,top,width,height,confidence and optionally more.

    Leaves out, in this order:

    - boxes of confidence 0, which MOTChallenge does not evaluate;
    - boxes of track -1, which have no identity;
    - boxes of classes other than 1, pedestrians, in a file of several classes. Column 8 is the class, in MOT16, MOT17
      and MOT20, which have nine columns, and in VisDrone, which has ten. MOT15 has world coordinates from the eighth of
      ten columns on: it has no classes if one of them is not a whole number up to 99. A class of -1 is none. A file of
      one class is read entirely, whatever the class.

    Visibility, column 9, is ignored.

    Args:
        path: the file.
        length: the number of frames, None if it is not known.
        identified: False to read a file of which no box has an identity, as detections; one of which some boxes have is
            read as ever.

    Returns:
        The boxes of each frame by its number, and a phrase for each of the last two kinds that was left out.

    Raises:
        UserError: the file is unreadable, a line is malformed, nothing is left, or there are several classes without 1.
    """
    lines = _read_lines(path, length)
    labels = _class_labels(lines)
    classes = sorted({label for label in labels if label is not None})
    listed = ", ".join(map(str, classes[:10])) + ", ..." * (len(classes) > 10)
    if len(classes) > 1 and PEDESTRIAN not in classes:
        raise UserError(f"{path}: got the classes {listed} in column 8, wanted 1 (pedestrian) or a single class")
    wanted = (PEDESTRIAN, None) if len(classes) > 1 else (*classes, None)
    detections = not identified and all(line.box.track == NO_IDENTITY for line in lines)
    read = [
        (line, label) for line, label in zip(lines, labels, strict=True) if detections or line.box.track != NO_IDENTITY
    ]
    people = [line for line, label in read if label in wanted]
    notes = []
    if unidentified := len(lines) - len(read):
        notes.append(f"{unidentified} boxes without an identity ({NO_IDENTITY}) left out")
    if others := len(read) - len(people):
        notes.append(f"class {PEDESTRIAN} of {listed} read: {others} boxes of other classes left out")
    if notes and not people:
        raise UserError(f"{path}: no box is left to read, wanted boxes of people with a track: {'; '.join(notes)}")
    return _group_by_frame(people), tuple(notes)


def last_frames(boxes: Mapping[int, Sequence[Box]]) -> dict[int, int]:
    """Return the number of the last frame with a box of each track, of boxes by frame number."""
    return {box.track: number for number in sorted(boxes) for box in boxes[number]}


def _read_lines(path: Path, length: int | None) -> list[_Line]:
    """Parse the lines, and leave out boxes of confidence 0."""
    try:
        content = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted a file of boxes, {COLUMNS}") from None
    lines = (
        _parse(f"{path}, line {number}", line, length)
        for number, line in enumerate(content.splitlines(), start=1)
        if line.strip()
    )
    return [line for line in lines if line is not None]


def _parse(where: str, text: str, length: int | None) -> _Line | None:
    got = f"{where}: got {text[:80]!r}"
    columns = text.split(",")
    try:
        if not text.isascii() or "_" in text:  # float() accepts both
            raise ValueError
        left, top, width, height, confidence = [float(column) for column in columns][2:7]
    except ValueError:
        raise UserError(f"{got}, wanted {COLUMNS}") from None
    frame, track = map(parse_int64, columns[:2])
    if frame is None or track is None or not all(map(isfinite, (left, top, width, height, confidence))):
        raise UserError(f"{got}, wanted finite numbers, frame and track whole and within int64")
    if confidence == 0:
        return None
    if length is None and frame < 1:
        raise UserError(f"{where}: got frame {frame}, wanted one from 1")
    if length is not None and not 1 <= frame <= length:
        raise UserError(f"{where}: got frame {frame}, wanted 1 to {length}, the seqLength of seqinfo.ini")
    if track < NO_IDENTITY:
        raise UserError(f"{where}: got track {track}, wanted one from 0, or {NO_IDENTITY} for no identity")
    if width <= 0 or height <= 0:
        raise UserError(f"{where}: got a box of {width:g} x {height:g}, wanted a positive size")
    label = parse_int64(columns[7]) if len(columns) > 7 else None
    world = len(columns) >= _WORLD_COLUMNS
    if label is None and len(columns) > 7 and not world:
        raise UserError(f"{where}: got {columns[7][:40]!r} in column 8, wanted a class, a whole number")
    return _Line(where, frame, Box(track, left, top, width, height), label, world)


def _class_labels(lines: list[_Line]) -> list[int | None]:
    """Return the class of each box, None where it has none."""
    no_classes = any(line.world and (line.label is None or not NO_CLASS <= line.label <= _MAX_CLASS) for line in lines)
    return [None if line.label == NO_CLASS or (line.world and no_classes) else line.label for line in lines]


def _group_by_frame(lines: list[_Line]) -> dict[int, list[Box]]:
    boxes: dict[int, list[Box]] = defaultdict(list)
    for line in lines:
        if line.box.track != NO_IDENTITY and any(box.track == line.box.track for box in boxes[line.frame]):
            raise UserError(f"{line.where}: track {line.box.track} has a box in frame {line.frame} already")
        boxes[line.frame].append(line.box)
    return boxes
