"""A MOTChallenge sequence on disk: seqinfo.ini, the boxes of gt.txt, and images or a video to cut them out of."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from configparser import ConfigParser, SectionProxy
from configparser import Error as IniError
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np

from training.data.datasets.mot_boxes import read_boxes
from training.data.tracklets import read_pixels
from training.data.video import read_video
from training.runtime.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v")


@dataclass(frozen=True)
class Track:
    """The crops of one track.

    Args:
        number: the track's number in gt.txt.
        moments: the numbers, from 1, of the frames it was cut out of, ascending.
        crops: (h, w, 3) uint8 RGB each, as many.
    """

    number: int
    moments: tuple[int, ...]
    crops: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Sequence:
    """The tracks of a sequence, in order of their numbers, and a phrase for each kind of boxes that was left out."""

    tracks: tuple[Track, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class SequenceInfo:
    """The contents of seqinfo.ini.

    Args:
        frame_rate: frames per second, if given.
        length: the number of frames.
        width: of a frame, if given.
        height: of a frame, if given.
        images: the name of the image folder.
    """

    frame_rate: float | None
    length: int
    width: int | None
    height: int | None
    images: str


def read_sequence(root: Path) -> Sequence:
    """Read a sequence: its frames once, in order, and of them what the boxes hold.

    Frames are upright, as players and viewers show them: boxes are cut after the rotation of a video and the EXIF
    orientation of an image. All have the size that seqinfo.ini gives, or that of the first. Boxes are clipped to the
    image; one that is entirely outside is left out, and so are those that `read_boxes` names.

    Args:
        root: the folder of seqinfo.ini, gt/gt.txt or gt.txt, and the image folder or one video file.

    Raises:
        UserError: a file is missing, malformed or unreadable, there is no box, fewer frames than seqinfo.ini says, or
            one of another size.
    """
    info = read_sequence_info(root)
    boxes, left_out = read_boxes(root, info.length)
    moments: dict[int, list[int]] = defaultdict(list)
    crops: dict[int, list[np.ndarray]] = defaultdict(list)
    for moment, image in enumerate(_frames(root, info), start=1):
        for box in boxes.get(moment, ()):
            crop = box.cut_out_of(image)
            if crop.size:
                moments[box.track].append(moment)
                crops[box.track].append(crop)
    if not moments:
        notes = "".join(f"; {note}" for note in left_out)
        raise UserError(f"{root}: gt.txt has no box, of a confidence other than 0, inside the image{notes}")
    tracks = (Track(number, tuple(moments[number]), tuple(crops[number])) for number in sorted(moments))
    return Sequence(tuple(tracks), left_out)


def read_sequence_info(root: Path) -> SequenceInfo:
    """Read seqinfo.ini, of which only seqLength is required.

    Raises:
        UserError: it is missing, or a number in it is missing or malformed.
    """
    path = root / "seqinfo.ini"
    ini = ConfigParser(interpolation=None)
    try:
        ini.read_string(path.read_text(encoding="utf-8-sig"))
        info = ini["Sequence"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted beside gt/gt.txt or gt.txt and img1/ or a video") from None
    except (IniError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}; wanted [Sequence] with the number of frames, seqLength") from None
    length = _positive(path, info, "seqLength")
    if length is None:
        raise UserError(f"{path}: no seqLength; wanted [Sequence] with the number of frames, seqLength")
    width, height = _positive(path, info, "imWidth"), _positive(path, info, "imHeight")
    return SequenceInfo(_frame_rate(path, info), length, width, height, info.get("imDir", "img1"))


def _positive(path: Path, info: SectionProxy, key: str) -> int | None:
    """Return a positive whole number of seqinfo.ini, None if it is not there."""
    text = info.get(key)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) == 0:
        raise UserError(f"{path}: got {key} {text[:40]!r}, wanted a positive whole number")
    return int(text)


def _frame_rate(path: Path, info: SectionProxy) -> float | None:
    text = info.get("frameRate")
    if text is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = inf
    if not 0 < rate < inf:
        raise UserError(f"{path}: got frameRate {text[:40]!r}, wanted a positive finite number")
    return rate


def _frames(root: Path, info: SequenceInfo) -> Iterator[np.ndarray]:
    """Yield the frames, upright, and raise at one of another size than wanted."""
    folder = root / info.images
    frames = _read_images(folder, info.length) if folder.is_dir() else _read_video(root, info)
    first = None
    for name, image in frames:
        height, width = image.shape[:2]
        got = f"{name}: got {width} x {height} pixels upright, wanted"
        if width != (info.width or width) or height != (info.height or height):
            keys = {"imWidth": info.width, "imHeight": info.height}
            wanted = " and ".join(f"{key} {value}" for key, value in keys.items() if value is not None)
            raise UserError(f"{got} {wanted}, as seqinfo.ini says")
        first = first or (width, height)
        if (width, height) != first:
            raise UserError(f"{got} {first[0]} x {first[1]}, the size of the first frame")
        yield image


def _read_images(folder: Path, length: int) -> Iterator[tuple[str, np.ndarray]]:
    paths: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES and re.fullmatch("[0-9]{1,18}", path.stem):
            first = paths.setdefault(int(path.stem), path)
            if first != path:
                raise UserError(f"{folder}: {first.name} and {path.name} are both image {int(path.stem)}, wanted one")
    for number in range(1, length + 1):
        if number not in paths:
            raise UserError(f"{folder}: no image {number:06d}, wanted 1 to {length}, the seqLength of seqinfo.ini")
        yield str(paths[number]), read_pixels(paths[number])


def _read_video(root: Path, info: SequenceInfo) -> Iterator[tuple[str, np.ndarray]]:
    videos = sorted(path for path in root.iterdir() if path.suffix.lower() in VIDEOS)
    if len(videos) != 1:
        found = ", ".join(path.name for path in videos) or "none"
        raise UserError(
            f"{root}: no folder {info.images}/, and the video files are {found}; wanted that folder or one video"
        )
    for number, image in enumerate(read_video(videos[0], info.length), start=1):
        yield f"{videos[0]}, frame {number}", image
