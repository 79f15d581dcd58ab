"""Boxes of people in a video, with tracks: of a file, or by a detector and a tracker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from training.data.datasets.mot_boxes import NO_IDENTITY, Box, last_frames, read_boxes
from training.data.datasets.mot_sequence import VIDEOS
from training.data.footage import Footage, TimedFrame
from training.find.detection import Detections, Detector
from training.find.tracking import LOST_SECONDS, Tracker
from training.runtime.errors import UserError


class BoxSource(Protocol):
    """Source of the boxes of each frame.

    description: of where they come from, for a line.
    found: False if the tracks are those of a file.
    untracked: number of boxes that were given to a tracker so far.
    """

    description: str
    found: bool
    untracked: int

    @property
    def numbers(self) -> Collection[int] | None:
        """Numbers of the tracks, None if they are not known before the video is read."""

    def of_frame(self, frame: TimedFrame) -> Iterable[Box]:
        """Return the boxes of a frame with their tracks; called for the frames in order."""

    def ended(self, frame: TimedFrame) -> Iterable[int]:
        """Return the tracks that have no box after this frame, each once at least."""

    def check_end(self, frames: int) -> None:
        """Raise a UserError if there are boxes of frames beyond the video's last."""


class _File:
    """Boxes of a file, by frame number."""

    def __init__(self, path: Path, boxes: Mapping[int, Sequence[Box]]) -> None:
        self._path, self._boxes = path, boxes

    def check_end(self, frames: int) -> None:
        """Raise a UserError if there are boxes of frames beyond the video's last."""
        if (last := max(self._boxes)) > frames:
            got = f"got boxes of frame {last}, but the video has {frames}"
            raise UserError(f"{self._path}: {got}; wanted boxes of this video")


class TracksOfFile(_File):
    """Boxes with tracks."""

    found = False
    untracked = 0

    def __init__(self, path: Path, boxes: Mapping[int, Sequence[Box]], notes: Sequence[str]) -> None:
        super().__init__(path, boxes)
        last = last_frames(boxes)
        self._ending = defaultdict(list)
        for track, number in last.items():
            self._ending[number].append(track)
        self.numbers = last.keys()
        self.description = "; ".join((f"boxes of {len(last)} tracks in {path}, to frame {max(boxes)}", *notes))

    def of_frame(self, frame: TimedFrame) -> Iterable[Box]:
        """Return the file's boxes of a frame."""
        return self._boxes.get(frame.number, ())

    def ended(self, frame: TimedFrame) -> Iterable[int]:
        """Return the tracks whose last box is in this frame."""
        return self._ending.get(frame.number, ())


class _FollowedBoxes:
    """Boxes whose tracks a tracker finds."""

    found = True
    numbers: Collection[int] | None = None

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._seen: dict[int, float] = {}
        self.untracked = 0

    def follow(self, detections: Detections, seconds: float) -> list[Box]:
        """Return the detections that have a track as boxes."""
        boxes = []
        self.untracked += len(detections.boxes)
        for track, row in self._tracker(detections, seconds):
            left, top, right, bottom = detections.boxes[row].tolist()
            boxes.append(Box(track, left + 1, top + 1, right - left, bottom - top))
            self._seen[track] = seconds
        return boxes

    def ended(self, frame: TimedFrame) -> Iterable[int]:
        """Return the tracks that the tracker has given up."""
        over = [track for track, seconds in self._seen.items() if frame.seconds - seconds > 2 * LOST_SECONDS]
        for track in over:
            del self._seen[track]
        return over


class DetectionsOfFile(_FollowedBoxes, _File):
    """Boxes without tracks. Scores are not read, as another detector's may mean anything."""

    def __init__(self, path: Path, boxes: Mapping[int, Sequence[Box]], notes: Sequence[str], frame_rate: float) -> None:
        _FollowedBoxes.__init__(self, Tracker(frame_rate, sure=0.5, scored=False))
        _File.__init__(self, path, boxes)
        count = sum(map(len, boxes.values()))
        self.description = "; ".join((f"{count} boxes without tracks in {path}, followed by ByteTrack", *notes))

    def of_frame(self, frame: TimedFrame) -> Iterable[Box]:
        """Return the file's boxes of a frame, with their tracks."""
        corners = [
            (box.left - 1, box.top - 1, box.left - 1 + box.width, box.top - 1 + box.height)
            for box in self._boxes.get(frame.number, ())
        ]
        boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
        return self.follow(Detections(boxes, np.ones(len(boxes))), frame.seconds)


class DetectedBoxes(_FollowedBoxes):
    """Boxes by a detector."""

    def __init__(self, detector: Detector, frame_rate: float) -> None:
        super().__init__(Tracker(frame_rate, detector.sure))
        self._detector = detector
        self.description = f"people detected by {detector.name}, followed by ByteTrack"

    def of_frame(self, frame: TimedFrame) -> Iterable[Box]:
        """Detect the people in a frame."""
        return self.follow(self._detector(frame.pixels), frame.seconds)

    def check_end(self, frames: int) -> None:
        """Do nothing: there are no boxes but those of the video's frames."""


def boxes_next_to(footage: Footage) -> Path | None:
    """Return the file of boxes next to a video or in a sequence's folder, or None.

    It has the video's name with .txt, or is gt/gt.txt or gt.txt of a folder with no other video.
    """
    folder = footage.path if footage.path.is_dir() else footage.path.parent
    files = [folder / "gt" / "gt.txt", folder / "gt.txt"]
    if not footage.path.is_dir():
        others = [path for path in folder.iterdir() if path.suffix.lower() in VIDEOS and path != footage.path]
        files = [footage.path.with_suffix(".txt"), *([] if others else files)]
    return next((path for path in files if path.is_file()), None)


def source_of_file(path: Path, frame_rate: float) -> TracksOfFile | DetectionsOfFile:
    """Read a file of boxes, as MOTChallenge's; where no box has a track, they are to be followed.

    Raises:
        UserError: it cannot be read, a line is malformed, or it has no box.
    """
    boxes, notes = read_boxes(path, None, identified=False)
    if not boxes:
        raise UserError(f"{path}: got no box of a confidence other than 0, wanted boxes of people")
    if any(box.track == NO_IDENTITY for of_frame in boxes.values() for box in of_frame):
        return DetectionsOfFile(path, boxes, notes, frame_rate)
    return TracksOfFile(path, boxes, notes)
