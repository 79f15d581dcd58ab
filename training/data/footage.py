"""Footage to look for people in: a video file, or the frames of a MOTChallenge sequence, with their times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.data.datasets.mot_seqinfo import SequenceInfo, read_sequence_info
from training.data.datasets.mot_sequence import find_video, read_frames
from training.data.video import decode_video, probe
from training.runtime.errors import UserError


class TimedFrame(NamedTuple):
    """A frame.

    number: from 1.
    seconds: time, as a player shows it.
    pixels: (h, w, 3) uint8 RGB.
    """

    number: int
    seconds: float
    pixels: np.ndarray


@dataclass(frozen=True)
class Footage:
    """A video or a sequence of images.

    path: the file, or the sequence's folder.
    frame_rate: frames per second.
    length: number of frames, about; None if it is not known.
    """

    path: Path
    frame_rate: float
    length: int | None
    _sequence: SequenceInfo | None = None

    def frames(self, skipped: Callable[[], None] | None = None) -> Iterator[TimedFrame]:
        """Yield the frames in order, upright; anew with each call.

        Args:
            skipped: called for each damaged packet of a video, which is then skipped; None for an error.

        Raises:
            UserError: a frame cannot be read.
        """
        if self._sequence is None:
            frames: Iterator[tuple[float | None, np.ndarray]] = decode_video(self.path, skipped)
        else:
            frames = read_frames(self.path, self._sequence)
        for number, (seconds, pixels) in enumerate(frames, start=1):
            assert seconds is not None, "the sequence has a frame rate"
            yield TimedFrame(number, seconds, pixels)


def open_footage(path: Path) -> Footage:
    """Open a video file, or a sequence's folder: one with seqinfo.ini and one video or a folder of images.

    Times are those of the video; of images they follow from frameRate.

    Raises:
        UserError: there is no such file, it is no video or has no video stream, or the sequence has no frameRate.
    """
    if path.is_dir():
        info = read_sequence_info(path)
        if not (path / info.images).is_dir():
            return open_footage(find_video(path, info))
        if info.frame_rate is None:
            raise UserError(f"{path / 'seqinfo.ini'}: no frameRate, wanted the frames per second, for the times")
        return Footage(path, info.frame_rate, info.length, info)
    if not path.is_file():
        raise UserError(f"video: there is no file {path}, wanted a video, or the folder of a MOTChallenge sequence")
    rate, length = probe(path)
    return Footage(path, rate, length)
