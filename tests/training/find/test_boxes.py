from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.data.datasets.mot_boxes import Box, read_boxes
from training.data.footage import Footage, TimedFrame
from training.find.boxes import (
    DetectedBoxes,
    DetectionsOfFile,
    TracksOfFile,
    boxes_next_to,
    source_of_file,
)
from training.find.detection import Detections
from training.find.scan import Scan, Track
from training.find.tracking import LOST_SECONDS
from training.runtime.errors import UserError


def frame(number: int, rate: float = 10) -> TimedFrame:
    return TimedFrame(number, (number - 1) / rate, np.zeros((80, 90, 3), np.uint8))


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("names", [("film.txt", "gt/gt.txt", "gt.txt"), ("gt/gt.txt", "gt.txt"), ("gt.txt",), ()])
def test_the_nearest_file_of_boxes_is_taken(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name, "")
    found = boxes_next_to(Footage(tmp_path / "film.mp4", 10, None))
    assert found == (tmp_path / names[0] if names else None)
    of_folder = [name for name in names if name != "film.txt"]
    assert boxes_next_to(Footage(tmp_path, 10, None)) == (tmp_path / of_folder[0] if of_folder else None)


def test_a_gt_txt_among_several_videos_is_of_none_of_them(tmp_path: Path) -> None:
    write(tmp_path / "gt.txt", "")
    (tmp_path / "film.mp4").touch()
    assert boxes_next_to(Footage(tmp_path / "film.mp4", 10, None)) == tmp_path / "gt.txt"
    (tmp_path / "other.AVI").touch()
    assert boxes_next_to(Footage(tmp_path / "film.mp4", 10, None)) is None
    write(tmp_path / "film.txt", "")
    assert boxes_next_to(Footage(tmp_path / "film.mp4", 10, None)) == tmp_path / "film.txt"


def test_tracks_of_a_file_end_with_their_last_box(tmp_path: Path) -> None:
    source = source_of_file(
        write(tmp_path / "gt.txt", "3,7,1,1,9,9,1", "1,7,1,1,9,9,1", "1,2,5,5,9,9,1", "2,-1,1,1,9,9,1"), 10
    )
    assert isinstance(source, TracksOfFile) and not source.found
    assert set(source.numbers) == {2, 7}
    assert [[box.track for box in source.of_frame(frame(n))] for n in (1, 2, 3)] == [[7, 2], [], [7]]
    assert [list(source.ended(frame(n))) for n in (1, 2, 3)] == [[2], [], [7]]
    assert source.description == (
        f"boxes of 2 tracks in {tmp_path / 'gt.txt'}, to frame 3; 1 boxes without an identity (-1) left out"
    )
    source.check_end(3)
    with pytest.raises(UserError, match=r"gt.txt: got boxes of frame 3, but the video has 2; wanted boxes of this"):
        source.check_end(2)


def test_boxes_of_no_track_are_followed_whatever_their_scores(tmp_path: Path) -> None:
    lines = [f"{n},-1,{10 + n},5,20,50,0.01" for n in range(1, 11)]
    source = source_of_file(write(tmp_path / "det.txt", *lines), 10)
    assert isinstance(source, DetectionsOfFile) and source.found and source.numbers is None
    boxes = [list(source.of_frame(frame(n))) for n in range(1, 12)]
    assert [[box.track for box in of_frame] for of_frame in boxes] == [[], *[[1]] * 9, []]
    assert (boxes[4][0].left, boxes[4][0].top, boxes[4][0].width, boxes[4][0].height) == (15, 5, 20, 50)
    assert "10 boxes without tracks in " in source.description
    with pytest.raises(UserError, match="got boxes of frame 10, but the video has 9"):
        source.check_end(9)


class _Walker:
    """A detector of one person, in the frames up to a number."""

    name, sure = "a walker", 0.5

    def __init__(self, last: int) -> None:
        self.last, self.calls = last, 0

    def __call__(self, pixels: np.ndarray) -> Detections:
        self.calls += 1
        there = self.calls <= self.last
        return Detections(np.array([[10.0, 5, 30, 55]] * there).reshape(-1, 4), np.ones(int(there)))


def test_a_detected_track_ends_once_after_the_tracker_has_lost_it() -> None:
    source = DetectedBoxes(_Walker(10), 10)
    ended = []
    for number in range(1, 80):
        boxes = list(source.of_frame(frame(number)))
        assert [box.track for box in boxes] == ([1] if 2 <= number <= 10 else [])
        ended += [(number, track) for track in source.ended(frame(number))]
    ((number, track),) = ended
    assert track == 1
    assert LOST_SECONDS < (number - 10) / 10 <= 2 * LOST_SECONDS + 0.2
    assert source.description == "people detected by a walker, followed by ByteTrack"


def test_boxes_are_interpolated_over_a_short_gap_only() -> None:
    track = Track(4)
    for number, left in ((1, 10), (2, 12), (6, 20), (40, 90)):
        track.append(frame(number), Box(4, left, 5, 20, 50 + number))
    assert track.box_at(frame(1)) == Box(4, 10, 5, 20, 51)
    assert track.box_at(frame(6)) == track.box(2) == Box(4, 20, 5, 20, 56)
    between = track.box_at(frame(3))
    assert between is not None
    assert (between.left, between.height) == pytest.approx((14, 53))
    assert track.box_at(frame(7)) is None, "the gap to 40 is over 3 s"
    assert Track(4, track.frames[1:], track.seconds[1:], track.sides[4:]).box_at(frame(1)) is None
    assert track.box_at(frame(41)) is None


def test_a_gap_is_bridged_by_how_often_a_track_is_seen() -> None:
    seldom = Track(1)
    for number in (1, 11, 21, 51):
        seldom.append(frame(number), Box(1, number, 5, 20, 50))
    assert (seldom.period, seldom.bridged) == (1.0, 2.5)
    assert seldom.box_at(frame(16)) == Box(1, 16, 5, 20, 50)
    assert seldom.box_at(frame(30)) is None
    assert [seldom.is_near(frame(n), 0.5) for n in (16, 25, 30, 46, 51, 56, 57)] == [1, 1, 0, 1, 1, 1, 0]


def test_written_tracks_are_read_again(tmp_path: Path) -> None:
    tracks = {}
    for number in (9, 2):
        track = tracks[number] = Track(number)
        for at in range(number, number + 3):
            track.append(frame(at), Box(number, 3.25 * number, 5, 20.5, 50))
    path = write(tmp_path / "tracks.txt")
    path.write_text(Scan(12, 0, tracks, {}).as_mot())
    boxes, notes = read_boxes(path, 12)
    assert notes == ()
    assert list(boxes) == [2, 3, 4, 9, 10, 11]
    assert boxes[10] == [Box(9, 29.25, 5, 20.5, 50)]
    long, dropped = Scan(12, 0, tracks, {}).at_least(4)
    assert (long, dropped) == ({}, ", 2 of fewer than 4 frames left out")
    assert Scan(12, 0, tracks, {}).at_least(3) == (tracks, "")
