"""One pass over a video: the boxes of every track, and its feature."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from training.data.datasets.mot_boxes import Box
from training.data.footage import Footage, TimedFrame
from training.engine.feature_extractor import FeatureExtractor
from training.evaluation.ranking import Floats
from training.find.boxes import BoxSource
from training.runtime.terminal import progress

BRIDGED = 1.0  # seconds without a box over which one is interpolated, at least


@dataclass
class Track:
    """A person followed through a video.

    number: of the track.
    frames, seconds: numbers and times of the frames with a box, ascending.
    sides: left, top, width and height of each box, one after another.
    """

    number: int
    frames: array[int] = field(default_factory=lambda: array("q"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    sides: array[float] = field(default_factory=lambda: array("d"))

    def append(self, frame: TimedFrame, box: Box) -> None:
        """Add the box of a later frame."""
        self.frames.append(frame.number)
        self.seconds.append(frame.seconds)
        self.sides.extend((box.left, box.top, box.width, box.height))

    def box(self, place: int) -> Box:
        """Return the box of the frame `frames[place]`."""
        return Box(self.number, *self.sides[4 * place : 4 * place + 4])

    def box_at(self, frame: TimedFrame) -> Box | None:
        """Return the box in a frame, interpolated where the track has a short gap there; None where it has none."""
        place = bisect_left(self.frames, frame.number)
        if place < len(self.frames) and self.frames[place] == frame.number:
            return self.box(place)
        if not 0 < place < len(self.frames) or self.seconds[place] - self.seconds[place - 1] > self.bridged:
            return None
        begin, end = self.seconds[place - 1], self.seconds[place]
        share = (frame.seconds - begin) / (end - begin)
        sides = np.array(self.sides[4 * place - 4 : 4 * place + 4]).reshape(2, 4)
        return Box(self.number, *((1 - share) * sides[0] + share * sides[1]).tolist())

    def is_near(self, frame: TimedFrame, margin: float) -> bool:
        """Return True if the track has a box in a frame, or has one within so many seconds before or after it."""
        place = bisect_left(self.seconds, frame.seconds)
        around = self.seconds[max(0, place - 1) : place + 1]
        return any(abs(frame.seconds - seconds) <= margin for seconds in around) or self.box_at(frame) is not None

    @cached_property
    def period(self) -> float:
        """Seconds from a box to the next, mostly; 0 if there is one only."""
        return float(np.median(np.diff(self.seconds))) if len(self.seconds) > 1 else 0.0

    @property
    def bridged(self) -> float:
        """Seconds without a box over which one is interpolated."""
        return max(BRIDGED, 2.5 * self.period)

    def seconds_with(self, other: Track) -> float:
        """Return for how long two tracks were seen at the same time."""
        return self.period * len(np.intersect1d(self.frames, other.frames, assume_unique=True))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the boxes as lines of a MOTChallenge file, each after the number of its frame."""
        for place, number in enumerate(self.frames):
            sides = ",".join(f"{side:.2f}" for side in self.sides[4 * place : 4 * place + 4])
            yield number, f"{number},{self.number},{sides},1,-1,-1,-1\n"


@dataclass(frozen=True)
class Scan:
    """Tracks and features found in one pass over a video.

    frames: number of frames.
    damaged: number of damaged packets that were skipped.
    tracks, features: by the track's number; features (D,) float64, not of length 1.
    """

    frames: int
    damaged: int
    tracks: dict[int, Track]
    features: dict[int, Floats]

    def at_least(self, frames: int) -> tuple[dict[int, Track], str]:
        """Return the tracks of so many frames or more, and a phrase about the others, "" if there are none."""
        long = {number: track for number, track in self.tracks.items() if len(track.frames) >= frames}
        short = len(self.tracks) - len(long)
        return long, f", {short} of fewer than {frames} frames left out" if short else ""

    def as_mot(self) -> str:
        """Return the boxes as a MOTChallenge file, in order of the frames."""
        lines = [line for track in self.tracks.values() for line in track.lines()]
        return "".join(line for _, line in sorted(lines, key=lambda line: line[0]))


def scan(footage: Footage, source: BoxSource, extractor: FeatureExtractor, every: int) -> Scan:
    """Follow the people through a video, and extract the feature of each track; a frame is read once and dropped.

    Args:
        footage: the video; damaged packets are skipped, and frames numbered without them.
        source: of the boxes; one that is outside of the image is left out.
        extractor: of the features.
        every: 1 for all frames, 2 for every second one, and so on.

    Raises:
        UserError: a frame cannot be read, boxes are of another video, or a feature is not finite.
    """
    stream, tracks, number = extractor.stream(), dict[int, Track](), 0
    damaged: list[None] = []
    with progress("Following people", footage.length, "frames") as advance:
        for frame in footage.frames(lambda: damaged.append(None)):
            number = frame.number
            if (number - 1) % every == 0:
                for box in source.of_frame(frame):
                    crop = box.crop(frame.pixels)
                    if crop.size:
                        tracks.setdefault(box.track, Track(box.track)).append(frame, box)
                        stream.add(box.track, crop)
            for track in source.ended(frame):
                stream.end(track)
            advance(1)
    source.check_end(number)
    return Scan(number, len(damaged), tracks, stream.finish())
