from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from training.data.tracklets import Tracklet
from training.runtime.errors import UserError
from training.show.picture import SPACING, break_name, fitted, index_of, label_heights, png


@pytest.mark.parametrize("ends", [[0.5] * 7, [0.0] * 7, [1.0] * 7, [0.1, 0.11, 0.12, 0.5, 0.9, 0.9, 0.99]])
def test_labels_keep_their_distance_within_the_panel_in_the_order_of_their_lines(ends: list[float]) -> None:
    heights = label_heights(ends)
    assert np.diff(heights).min() >= SPACING - 1e-9
    assert heights.min() >= 0 and heights.max() <= 1 + 1e-9


def test_a_label_is_at_its_line_s_height_where_there_is_room() -> None:
    assert label_heights([0.1, 0.3, 0.5]) == pytest.approx([0.1, 0.3, 0.5])


def test_a_frame_keeps_its_shape_in_the_middle_of_its_box() -> None:
    assert fitted(np.zeros((100, 50, 3)), 3, 1, 1, 2) == (3, 4, 3, 1)
    assert fitted(np.zeros((100, 25, 3)), 3, 1, 1, 2) == (3.25, 3.75, 3, 1)
    assert fitted(np.zeros((50, 50, 3)), 3, 1, 1, 2) == (3, 4, 2.5, 1.5)


def test_a_figure_has_one_png_of_its_size() -> None:
    first, second = (png(Figure(figsize=(2, 1), dpi=50)) for _ in range(2))
    assert first == second
    with Image.open(BytesIO(first)) as opened:
        assert (opened.format, opened.size) == ("PNG", (100, 50))


def named(*names: str) -> list[Tracklet]:
    return [Tracklet(1, 1, (np.zeros((2, 2, 3), np.uint8),), name) for name in names]


def test_a_tracklet_is_named_without_its_time_where_one_has_it() -> None:
    tracklets = named("track1@0:00.0-0:02.0", "track11@0:01.0-0:03.0", "track2@0:04.0-0:05.0", "track2@0:07.0-0:09.0")
    assert index_of("track11@0:01.0-0:03.0", tracklets, "tracklet") == 1
    assert index_of("track1", tracklets, "tracklet") == 0
    for name in ("track2", "track3", "track"):
        with pytest.raises(UserError, match=rf"^tracklet: got '{name}', wanted the name of a tracklet such as track1@"):
            index_of(name, tracklets, "tracklet")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("cam1/person001", ["cam1/person001"]),
        ("track18@0:53.0-1:02.0", ["track18", "0:53.0-1:02.0"]),
        ("bbox_test/0002C1T0001", ["bbox_test/", "0002C1T0001"]),
        ("anna/entrance/first-visit", ["anna/entrance/", "first-visit"]),
        ("averyveryverylongname", ["averyveryverylongname"]),
    ],
)
def test_a_long_name_is_broken_where_it_has_parts(name: str, lines: list[str]) -> None:
    assert break_name(name).split("\n") == lines
