from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from training.errors import UserError
from training.show.picture import APART, check_output, fitted, heights_of_names, save


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


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    save(Figure(figsize=(2, 1), dpi=50), path)
    before = path.read_bytes()
    with Image.open(path) as opened:
        assert opened.size == (100, 50)
    (tmp_path / "picture.png.new").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        save(Figure(figsize=(1, 1)), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["picture.jpg", "folder.png", "absent/picture.png", "file/picture.png"])
def test_where_no_png_can_be_written_is_told_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"output: got {tmp_path}/{name}, wanted"):
        check_output(tmp_path / name)
