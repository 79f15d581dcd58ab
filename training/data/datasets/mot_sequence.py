"""Crop the tracks of a MOTChallenge sequence out of its images or video."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.datasets.mot_boxes import boxes_file, read_boxes
from training.data.datasets.mot_seqinfo import SequenceInfo, read_sequence_info
from training.data.tracklets import read_pixels
from training.data.video import read_video
from training.runtime.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v")


@dataclass(frozen=True)
class Track:
    """Crops of one track.

    Args:
        number: the track's number in gt.txt.
        frame_numbers: of the frames with a crop, from 1, ascending.
        seconds: their times, empty where those are not known.
        crops: (h, w, 3) uint8 RGB each, one per frame number.
    """

    number: int
    frame_numbers: tuple[int, ...]
    seconds: tuple[float, ...]
    crops: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class MotSequence:
    """Tracks of a sequence, in order of their numbers, and a phrase for each kind of boxes that was left out."""

    tracks: tuple[Track, ...]
    left_out: tuple[str, ...]


def read_sequence(root: Path) -> MotSequence:
    """Decode a sequence's frames once, in order, and crop the boxes.

    Frames are upright, as players and viewers show them: boxes are cropped after the rotation of a video and the EXIF
    orientation of an image. All have the size that seqinfo.ini gives, or that of the first. Boxes are clipped to the
    image; one that is entirely outside is left out, and so are those that `read_boxes` names.

    Args:
        root: the folder of seqinfo.ini, gt/gt.txt or gt.txt, and the image folder or one video file.

    Raises:
        UserError: a file is missing, malformed or unreadable, there is no box, fewer frames than seqinfo.ini says, or
            one of another size.
    """
    info = read_sequence_info(root)
    boxes, left_out = read_boxes(boxes_file(root), info.length)
    frame_numbers: dict[int, list[int]] = defaultdict(list)
    times: dict[int, list[float]] = defaultdict(list)
    crops: dict[int, list[np.ndarray]] = defaultdict(list)
    for frame_number, (seconds, image) in enumerate(read_frames(root, info), start=1):
        for box in boxes.get(frame_number, ()):
            crop = box.crop(image)
            if crop.size:
                frame_numbers[box.track].append(frame_number)
                times[box.track] += [] if seconds is None else [seconds]
                crops[box.track].append(crop)
    if not crops:
        notes = "".join(f"; {note}" for note in left_out)
        raise UserError(f"{root}: gt.txt has no box, of a confidence other than 0, inside the image{notes}")
    tracks = (
        Track(number, tuple(frame_numbers[number]), tuple(times[number]), tuple(crops[number]))
        for number in sorted(crops)
    )
    return MotSequence(tuple(tracks), left_out)


def read_frames(root: Path, info: SequenceInfo) -> Iterator[tuple[float | None, np.ndarray]]:
    """Yield the upright frames of a sequence, (h, w, 3) uint8 RGB, each after its time in seconds.

    The time is the video's own; of images it follows from frameRate, and is None without one.

    Raises:
        UserError: a frame is missing or unreadable, or has another size than seqinfo.ini or the first frame.
    """
    folder = root / info.images
    frames = _read_images(folder, info) if folder.is_dir() else _read_video(root, info)
    first = None
    for seconds, name, image in frames:
        height, width = image.shape[:2]
        got = f"{name}: got {width} x {height} pixels upright, wanted"
        if width != (info.width or width) or height != (info.height or height):
            keys = {"imWidth": info.width, "imHeight": info.height}
            wanted = " and ".join(f"{key} {value}" for key, value in keys.items() if value is not None)
            raise UserError(f"{got} {wanted}, as seqinfo.ini says")
        first = first or (width, height)
        if (width, height) != first:
            raise UserError(f"{got} {first[0]} x {first[1]}, the size of the first frame")
        yield seconds, image


def _read_images(folder: Path, info: SequenceInfo) -> Iterator[tuple[float | None, str, np.ndarray]]:
    paths: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES and re.fullmatch("[0-9]{1,18}", path.stem):
            first = paths.setdefault(int(path.stem), path)
            if first != path:
                raise UserError(f"{folder}: {first.name} and {path.name} are both image {int(path.stem)}, wanted one")
    for number in range(1, info.length + 1):
        if number not in paths:
            raise UserError(f"{folder}: no image {number:06d}, wanted 1 to {info.length}, the seqLength of seqinfo.ini")
        seconds = None if info.frame_rate is None else (number - 1) / info.frame_rate
        yield seconds, str(paths[number]), read_pixels(paths[number])


def find_video(root: Path, info: SequenceInfo) -> Path:
    """Return the one video file of a sequence's folder.

    Raises:
        UserError: there is none, or several.
    """
    videos = sorted(path for path in root.iterdir() if path.suffix.lower() in VIDEOS)
    if len(videos) != 1:
        found = ", ".join(path.name for path in videos) or "none"
        raise UserError(
            f"{root}: no folder {info.images}/, and the video files are {found}; wanted that folder or one video"
        )
    return videos[0]


def _read_video(root: Path, info: SequenceInfo) -> Iterator[tuple[float | None, str, np.ndarray]]:
    video = find_video(root, info)
    for number, (seconds, image) in enumerate(read_video(video, info.length), start=1):
        yield seconds, f"{video}, frame {number}", image
