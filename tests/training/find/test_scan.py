from __future__ import annotations

import tracemalloc
from pathlib import Path

from tests.helpers.small_video import Visit, write_video
from training.data.footage import open_footage
from training.engine.feature_extractor import FeatureExtractor
from training.find.boxes import source_of_file
from training.find.scan import Scan, scan


def scanned(video: Path, every: int = 1) -> Scan:
    footage = open_footage(video)
    source = source_of_file(video.parent / "gt.txt", footage.frame_rate)
    return scan(footage, source, FeatureExtractor(device="cpu", chunk=8), every)


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    peaks = []
    for frames in (60, 480):
        folder = tmp_path / str(frames)
        folder.mkdir()
        # People follow one another, two at a time.
        visits = [Visit(n, n % 3 + 1, 1 + 20 * n, 40, 100 * (n % 2), 2) for n in range(frames // 20 - 1)]
        video = write_video(folder / "people.mp4", visits, frames)
        scanned(video)  # whatever is made once
        tracemalloc.start()
        assert len(scanned(video).features) == len(visits)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    frame = 240 * 320 * 3
    assert peaks[1] - peaks[0] < 4 * frame, "8 times the frames and tracks"


def test_skipped_frames_are_not_looked_at(rendered: Path) -> None:
    whole, part = scanned(rendered), scanned(rendered, every=3)
    assert (whole.frames, part.frames) == (60, 60)
    for number, track in part.tracks.items():
        assert list(track.frames) == [n for n in whole.tracks[number].frames if n % 3 == 1]
    assert part.features.keys() == whole.features.keys()


def test_boxes_beyond_the_image_are_clipped_and_those_outside_left_out(tmp_path: Path, rendered: Path) -> None:
    source = tmp_path / "gt.txt"
    source.write_text("1,1,-30,-20,60,90,1\n2,1,500,10,20,40,1\n3,1,300,200,60,90,1\n1,2,-90,10,20,40,1\n")
    footage = open_footage(rendered)
    found = scan(footage, source_of_file(source, 10), FeatureExtractor(device="cpu"), 1)
    assert found.tracks.keys() == found.features.keys() == {1}
    assert list(found.tracks[1].frames) == [1, 3]
