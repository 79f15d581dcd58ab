from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from matplotlib.figure import Figure

from training.data.datasets.mot_boxes import Box
from training.data.footage import TimedFrame
from training.find.annotated_video import MARGIN, AnnotatedVideo
from training.find.matches import Match
from training.find.page import CROPS, LETTERS, page, places
from training.find.scan import Track
from training.runtime.errors import UserError


def match(rank: int, number: int, first: int, last: int, score: float | None = 0.9) -> Match:
    track = Track(number)
    for at in range(first, last + 1):
        track.append(TimedFrame(at, (at - 1) / 10, np.zeros((1, 1, 3))), Box(number, 11, 21, 20, 30))
    return Match(rank, score, track)


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.axes[0].texts]


CROP = np.zeros((40, 20, 3), np.uint8)


def test_a_page_has_a_strip_for_the_person_and_each_match() -> None:
    matches = [match(1, 5, 1, 30), match(2, 3, 11, 20, 0.5)]
    figure = page("5 tracks in a.mp4", "track 9", [CROP] * 8, matches, {5: [CROP] * 8, 3: [CROP] * 3})
    assert texts(figure) == [
        "looked for: track 9",
        "5 tracks in a.mp4",
        "1",
        "score 0.900\n0:00.0 - 0:02.9\n30 frames\ntrack 5",
        "2",
        "score 0.500\n0:01.0 - 0:01.9\n10 frames\ntrack 3",
    ]
    assert len(figure.axes[0].images) == 8 + 8 + 3


def test_a_list_of_everybody_is_numbered_by_the_tracks() -> None:
    figure = page("2 tracks", "", [], [match(1, 5, 1, 30, None)], {5: [CROP]})
    assert texts(figure) == ["2 tracks", "5", "0:00.0 - 0:02.9\n30 frames"]


def test_nothing_reaches_beyond_the_page_or_over_another() -> None:
    long = "a very long heading about many tracks " * 8
    figure = page(
        long, "12 crops in /a/folder", [CROP] * 8, [match(1, 5, 1, 30)], {5: [np.zeros((9, 90, 3), np.uint8)] * 8}
    )
    lines = texts(figure)
    assert max(map(len, lines)) <= LETTERS
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    width, height = figure.bbox.width, figure.bbox.height
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    images = [image.get_window_extent() for image in figure.axes[0].images]
    assert not any(box.overlaps(image) for box in boxes for image in images)
    assert not any(box.overlaps(other) for n, box in enumerate(boxes) for other in boxes[:n])


@pytest.mark.parametrize(("count", "wanted"), [(1, [0]), (3, [0, 1, 2]), (8, [*range(8)])])
def test_a_short_track_is_drawn_whole(count: int, wanted: list[int]) -> None:
    assert places(count) == wanted


def test_a_long_track_is_drawn_from_first_to_last() -> None:
    drawn = places(1000)
    assert (drawn[0], drawn[-1], len(drawn)) == (0, 999, CROPS)
    assert max(np.diff(drawn)) - min(np.diff(drawn)) <= 1


def write(path: Path, size: tuple[int, int], matches: list[Match], last: int = 60) -> list[tuple[float, np.ndarray]]:
    with AnnotatedVideo(path, matches, 10) as video:
        for number in range(1, last + 1):
            video.add(TimedFrame(number, (number - 1) / 10, np.full((*size, 3), 100, np.uint8)))
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_what_is_between_two_matches_is_left_out(tmp_path: Path) -> None:
    matches = [match(1, 1, 40, 49), match(2, 2, 1, 10)]
    frames = write(tmp_path / "a.mp4", (60, 80), matches)
    assert len(frames) == (10 + 10 * MARGIN) + (10 + 20 * MARGIN)
    np.testing.assert_allclose(np.diff([time for time, _ in frames]), 0.1, atol=1e-3)
    with AnnotatedVideo(tmp_path / "b.mp4", matches, 10) as video:
        assert not video.is_over(5.2) and video.is_over(5.4)
        video.add(TimedFrame(1, 0, np.zeros((60, 80, 3), np.uint8)))


@pytest.mark.parametrize("size", [(61, 81), (17, 33), (480, 640), (1, 40)])
def test_frames_of_any_size_are_encoded(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = write(tmp_path / "a.mp4", size, [match(1, 1, 1, 5)], last=5)
    assert [pixels.shape for _, pixels in frames] == [(-(-size[0] // 2) * 2, -(-size[1] // 2) * 2, 3)] * 5


def test_boxes_beyond_the_image_are_drawn_as_far_as_they_are_in_it(tmp_path: Path) -> None:
    beyond = match(1, 1, 1, 5)
    for place in range(5):
        beyond.track.sides[4 * place : 4 * place + 4] = type(beyond.track.sides)("d", (-50, -50, 500, 500))
    assert len(write(tmp_path / "a.mp4", (60, 80), [beyond], last=5)) == 5


def test_a_match_is_shown_at_its_speed_without_the_time_it_is_away(tmp_path: Path) -> None:
    track = Track(1)
    seconds = [0.0, 0.1, 0.2, 2.2, 4.2, 6.2, *np.arange(30, 36)]  # a camera that is slower at night
    frames = [TimedFrame(n, at, np.full((60, 80, 3), 100, np.uint8)) for n, at in enumerate(seconds, start=1)]
    for frame in (*frames[:6], *frames[9:]):
        track.append(frame, Box(1, 11, 21, 20, 30))
    with AnnotatedVideo(tmp_path / "a.mp4", [Match(1, 0.9, track)], 10) as video:
        for frame in frames:
            video.add(frame)
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(np.diff(times), [0.1, 0.1, 2, 2, 2, 0.1, 1, 1], atol=1e-3)


@pytest.mark.parametrize("left", [-40, 300])
def test_labels_are_within_the_image(tmp_path: Path, left: int) -> None:
    track = Track(1)
    for number in range(1, 6):
        track.append(TimedFrame(number, (number - 1) / 10, np.zeros((1, 1, 3))), Box(1, left, -20, 60, 100))
    pixels = write(tmp_path / "a.mp4", (240, 320), [Match(1, 0.9, track)], last=5)[2][1].astype(int)
    orange = (pixels[..., 0] > 180) & (pixels[..., 2] < 90)  # the first color
    columns = np.flatnonzero(orange[4:12].any(0))
    assert columns[-1] - columns[0] > 40, "the label is whole"
    assert (pixels[225:, :30].max(2) < 80).any(), "the clock is in the other corner"


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^output: .*gone/a.mp4: ") as raised:
        write(tmp_path / "gone" / "a.mp4", (60, 80), [match(1, 1, 1, 5)])
    assert "\n" not in str(raised.value)
