from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from training.show.picture import APART, fitted, heights_of_names, png


@pytest.mark.parametrize("ends", [[0.5] * 7, [0.0] * 7, [1.0] * 7, [0.1, 0.11, 0.12, 0.5, 0.9, 0.9, 0.99]])
def test_names_stand_apart_within_the_panel_in_the_order_of_their_lines(ends: list[float]) -> None:
    heights = heights_of_names(ends)
    assert np.diff(heights).min() >= APART - 1e-9
    assert heights.min() >= 0 and heights.max() <= 1 + 1e-9


def test_a_name_stands_beside_its_line_where_there_is_room() -> None:
    assert heights_of_names([0.1, 0.3, 0.5]) == pytest.approx([0.1, 0.3, 0.5])


def test_a_frame_keeps_its_shape_in_the_middle_of_its_box() -> None:
    assert fitted(np.zeros((100, 50, 3)), 3, 1, 1, 2) == (3, 4, 3, 1)
    assert fitted(np.zeros((100, 25, 3)), 3, 1, 1, 2) == (3.25, 3.75, 3, 1)
    assert fitted(np.zeros((50, 50, 3)), 3, 1, 1, 2) == (3, 4, 2.5, 1.5)


def test_a_figure_has_one_png_of_its_size() -> None:
    first, second = (png(Figure(figsize=(2, 1), dpi=50)) for _ in range(2))
    assert first == second
    with Image.open(BytesIO(first)) as opened:
        assert (opened.format, opened.size) == ("PNG", (100, 50))
