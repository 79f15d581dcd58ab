"""Tracks of people from the detections of each frame, by ByteTrack as the `trackers` library has it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from training.find.detection import Detections
from training.runtime.command import need

LOST_SECONDS = 2.0  # after which a track that was not seen has ended
# Least intersection over union of a detection and where a track is expected. On PETS 2009 by HOG, 95 % of the boxes of
# tracks of 8 frames or more are then of the track's most frequent person; 90 % by the library's 0.1.
_LEAST_IOU = 0.2


class Tracker:
    """Links detections to tracks, numbered from 1.

    Args:
        frame_rate: frames per second that are given to it, about.
        sure: score from which a detection may begin a track; weaker ones only continue one.
        scored: False if scores mean nothing, and every detection may begin a track.

    Raises:
        UserError: the library is missing.
    """

    def __init__(self, frame_rate: float, sure: float, scored: bool = True) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that it imports
            self._supervision, trackers = need("supervision", "find"), need("trackers", "find")
        self._scored = scored
        self._tracker = trackers.ByteTrackTracker(
            lost_track_buffer=round(30 * LOST_SECONDS),  # in frames of a 30th of a second, whatever the rate
            frame_rate=frame_rate,
            track_activation_threshold=sure,
            high_conf_det_threshold=sure,
            minimum_iou_threshold=_LEAST_IOU,
        )

    def __call__(self, detections: Detections, seconds: float) -> Iterator[tuple[int, int]]:
        """Yield the track of each detection that has one, as (track, row of the detections)."""
        given = self._supervision.Detections(
            xyxy=detections.boxes,
            confidence=detections.scores if self._scored else None,
            data={"row": np.arange(len(detections.boxes))},
        )
        followed = self._tracker.update(given, timestamp=seconds)
        for track, row in zip(followed.tracker_id.tolist(), followed.data.get("row", ()), strict=False):
            if track >= 0:
                yield track + 1, int(row)
