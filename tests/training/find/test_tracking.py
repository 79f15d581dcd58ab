from __future__ import annotations

import numpy as np
import pytest

from training.find.detection import Detections
from training.find.tracking import LOST_SECONDS, Tracker


def box(left: float) -> list[float]:
    return [left, 10.0, left + 20, 60.0]


def follow(tracker: Tracker, frames: list[list[tuple[float, float]]], rate: float = 10) -> list[dict[int, int]]:
    """Return the row of each track in each frame; a detection is (left, score)."""
    tracks = []
    for number, frame in enumerate(frames):
        boxes = np.array([box(left) for left, _ in frame]).reshape(-1, 4)
        scores = np.array([score for _, score in frame])
        tracks.append(dict(tracker(Detections(boxes, scores), number / rate)))
    return tracks


def test_two_people_keep_their_tracks() -> None:
    frames = [[(2.0 * n, 0.9), (300 - 2.0 * n, 0.9)][:: 1 if n % 2 else -1] for n in range(30)]
    tracks = follow(Tracker(10, 0.5), frames)
    assert tracks[0] == {}, "one box is no track yet"
    one, other = sorted(tracks[1])
    assert {one, other} == {1, 2}
    for number, frame in enumerate(tracks[1:], start=1):
        assert frame.keys() == {1, 2}
        assert frames[number][frame[1]][0] != frames[number][frame[2]][0]
    lefts = [[frames[n][frame[track]][0] for n, frame in enumerate(tracks) if frame] for track in (1, 2)]
    assert all(np.abs(np.diff(left)).max() == 2 for left in lefts), "none jumps to the other"


@pytest.mark.parametrize(("gap", "same"), [(LOST_SECONDS - 0.3, True), (LOST_SECONDS + 0.3, False)])
@pytest.mark.parametrize("rate", [5, 10, 25])
def test_a_track_outlives_a_gap_of_seconds_at_any_rate(gap: float, same: bool, rate: int) -> None:
    frames: list[list[tuple[float, float]]] = [[(50.0, 0.9)]] * rate
    frames = [*frames, *[[]] * round(gap * rate), *frames]
    numbers = {track for frame in follow(Tracker(rate, 0.5), frames, rate) for track in frame}
    assert numbers == ({1} if same else {1, 2})


def test_a_weak_detection_continues_a_track_and_begins_none() -> None:
    weak = [[(50.0, 0.2)]] * 10
    assert not any(follow(Tracker(10, 0.5), weak))
    tracks = follow(Tracker(10, 0.5), [[(50.0, 0.9)]] * 3 + weak)
    assert [frame.keys() for frame in tracks[1:]] == [{1}] * 12
    assert any(follow(Tracker(10, 0.5, scored=False), weak)), "unless scores mean nothing"


def test_no_detections_are_no_tracks() -> None:
    assert follow(Tracker(10, 0.5), [[]] * 3) == [{}] * 3
