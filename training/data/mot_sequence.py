"""A MOTChallenge sequence on disk: seqinfo.ini, the boxes of gt.txt, and images or a video to cut them out of."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from configparser import ConfigParser
from configparser import Error as IniError
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from training.data.tracklets import read_frame
from training.errors import UserError

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
    """The tracks of a sequence, in order of their numbers, and its frames a second."""

    frame_rate: float
    tracks: tuple[Track, ...]


@dataclass(frozen=True)
class _Box:
    track: int
    left: float  # from 1, as MOTChallenge counts pixels
    top: float
    width: float
    height: float

    def cut_out_of(self, image: np.ndarray) -> np.ndarray:
        """Return a copy of the part of the box that is inside the image; it may be empty."""
        rows = slice(max(floor(self.top - 1), 0), max(ceil(self.top - 1 + self.height), 0))
        columns = slice(max(floor(self.left - 1), 0), max(ceil(self.left - 1 + self.width), 0))
        return np.array(image[rows, columns])


def read_sequence(root: Path) -> Sequence:
    """Read a sequence: its frames once, in order, and of them what the boxes hold.

    Boxes of confidence 0 are not evaluated in MOTChallenge and are ignored here. Boxes are clipped to the image; one
    that lies outside it is left out.

    Args:
        root: the folder of seqinfo.ini, gt/gt.txt or gt.txt, and the image folder or one video file.

    Raises:
        UserError: a file is missing, malformed or unreadable, there is no box, or fewer frames than seqinfo.ini says.
    """
    frame_rate, length, images = _read_seqinfo(root / "seqinfo.ini")
    boxes = _read_boxes(root, length)
    frames = _read_images(root / images, length) if (root / images).is_dir() else _decode(_video(root, images), length)
    moments: dict[int, list[int]] = defaultdict(list)
    crops: dict[int, list[np.ndarray]] = defaultdict(list)
    for moment, image in enumerate(frames, start=1):
        for box in boxes[moment]:
            crop = box.cut_out_of(image)
            if crop.size:
                moments[box.track].append(moment)
                crops[box.track].append(crop)
    if not moments:
        raise UserError(f"{root}: gt.txt has no box, of a confidence other than 0, inside the image")
    tracks = (Track(number, tuple(moments[number]), tuple(crops[number])) for number in sorted(moments))
    return Sequence(frame_rate, tuple(tracks))


def _read_seqinfo(path: Path) -> tuple[float, int, str]:
    """Return frames a second, the number of frames, and the name of the image folder."""
    ini = ConfigParser(interpolation=None)
    try:
        ini.read_string(path.read_text(encoding="utf-8-sig"))
        info = ini["Sequence"]
        frame_rate, length = float(info["frameRate"]), int(info["seqLength"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted beside gt/gt.txt or gt.txt and img1/ or a video") from None
    except (IniError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}; wanted [Sequence] with numbers frameRate and seqLength") from None
    if not 0 < frame_rate < inf or length < 1:
        raise UserError(f"{path}: got frameRate {frame_rate:g} and seqLength {length}, wanted both positive and finite")
    return frame_rate, length, info.get("imDir", "img1")


def _read_boxes(root: Path, length: int) -> dict[int, list[_Box]]:
    """Return the boxes of each frame."""
    path = root / "gt" / "gt.txt"
    if not path.is_file():
        path = root / "gt.txt"
    if not path.is_file():
        raise UserError(f"{path}: not found, nor gt/gt.txt beside it")
    boxes: dict[int, list[_Box]] = defaultdict(list)
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            columns = [float(column) for column in line.split(",")]
            frame, track, left, top, width, height, confidence = columns[:7]
        except ValueError:
            raise UserError(f"{where}: got {line!r}, wanted frame,track,left,top,width,height,confidence") from None
        if not all(map(isfinite, columns[:7])) or not frame.is_integer() or not track.is_integer():
            raise UserError(f"{where}: got {line!r}, wanted finite numbers, frame and track whole")
        if confidence == 0:
            continue
        if not 1 <= frame <= length:
            raise UserError(f"{where}: got frame {frame:.0f}, wanted 1 to {length}, the seqLength of seqinfo.ini")
        if width <= 0 or height <= 0:
            raise UserError(f"{where}: got a box of {width:g} x {height:g}, wanted a positive size")
        if any(box.track == track for box in boxes[int(frame)]):
            raise UserError(f"{where}: track {track:.0f} has a box in frame {frame:.0f} already")
        boxes[int(frame)].append(_Box(int(track), left, top, width, height))
    return boxes


def _read_images(folder: Path, length: int) -> Iterator[np.ndarray]:
    paths: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES and re.fullmatch(r"\d{1,18}", path.stem):
            first = paths.setdefault(int(path.stem), path)
            if first != path:
                raise UserError(f"{folder}: {first.name} and {path.name} are both image {int(path.stem)}, wanted one")
    for number in range(1, length + 1):
        if number not in paths:
            raise UserError(f"{folder}: no image {number:06d}, wanted 1 to {length}, the seqLength of seqinfo.ini")
        yield read_frame(paths[number]).permute(1, 2, 0).numpy()


def _video(root: Path, images: str) -> Path:
    videos = sorted(path for path in root.iterdir() if path.suffix.lower() in VIDEOS)
    if len(videos) != 1:
        found = ", ".join(path.name for path in videos) or "none"
        raise UserError(
            f"{root}: no folder {images}/, and the video files are {found}; wanted that folder or one video"
        )
    return videos[0]


def _decode(video: Path, length: int) -> Iterator[np.ndarray]:
    number = 0
    try:
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0), start=1):
                yield frame.to_ndarray(format="rgb24")
                if number == length:
                    return
    except (FFmpegError, IndexError) as error:  # IndexError: no video stream
        raise UserError(f"{video}: cannot be decoded after frame {number} ({error})") from None
    raise UserError(f"{video}: got {number} frames, wanted {length}, the seqLength of seqinfo.ini")
