from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from training.data.image_folder import frames_of_folder, images_in, is_image
from training.runtime.errors import UserError


def test_numbers_in_names_count_as_numbers(tmp_path: Path) -> None:
    for name in ("f10.png", "f9.JPG", "a2b10.bmp", "a2b9.png", "10.png", "9.png", "x.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._f1.png").touch()
    wanted = ["9.png", "10.png", "a2b9.png", "a2b10.bmp", "f9.JPG", "f10.png", "x.png"]
    assert [path.name for path in images_in(tmp_path)] == wanted
    assert is_image(Path("a.webp")) and not is_image(Path("a.mp4"))


def test_a_folder_without_frames_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^frames: got no image in .*, wanted the frames of a tracklet$"):
        frames_of_folder(tmp_path, "frames")
    with pytest.raises(UserError, match=r"^person: .*gone: No such file or directory, wanted a folder of images$"):
        frames_of_folder(tmp_path / "gone", "person")
