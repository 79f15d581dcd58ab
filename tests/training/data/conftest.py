"""Small datasets on disk, in the layouts the readers expect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

PEOPLE = (1, 2, 4, 319)  # gaps in the numbers, as in the real set
SPLITS = Path("train-test people splits/train_test_splits_ilidsvid.mat")


@pytest.fixture
def ilids(tmp_path: Path) -> Path:
    """Four people, three frames each, and two splits; frame f of person p at camera c is all (p % 256, c, f)."""
    for camera in (1, 2):
        for person in PEOPLE:
            folder = tmp_path / f"i-LIDS-VID/sequences/cam{camera}/person{person:03d}"
            folder.mkdir(parents=True)
            for frame in (9, 10, 101):  # in order as numbers, not as strings
                image = Image.new("RGB", (6, 8), (person % 256, camera, frame))
                image.save(folder / f"cam{camera}_person{person:03d}_{frame}.png")
    (tmp_path / SPLITS).parent.mkdir()
    savemat(tmp_path / SPLITS, {"ls_set": np.array([[4, 1, 3, 2], [2, 3, 1, 4]])})
    return tmp_path


@pytest.fixture
def mot(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a sequence: `tracks` gives each track's frames, `length` the number of images.

    Pixel (row, column) of frame f is (row, column, f); a box of track k is 10 wide and 20 high at left 2k+1, top k+1.
    """

    def write(tracks: dict[int, range], length: int = 60, identities: str | None = None) -> Path:
        (tmp_path / "gt").mkdir()
        (tmp_path / "img1").mkdir()
        (tmp_path / "seqinfo.ini").write_text(f"[Sequence]\nimDir=img1\nframeRate=7\nseqLength={length}\n")
        boxes = [f"{f},{k},{2 * k + 1},{k + 1},10,20,1,-1,-1,-1" for k, frames in tracks.items() for f in frames]
        (tmp_path / "gt/gt.txt").write_text("\n".join(boxes) + "\n")
        rows, columns = np.mgrid[:40, :48].astype(np.uint8)
        for frame in range(1, length + 1):
            pixels = np.stack([rows, columns, np.full_like(rows, frame)], axis=-1)
            Image.fromarray(pixels).save(tmp_path / f"img1/{frame:06d}.png")
        if identities is not None:
            (tmp_path / "identities.csv").write_text(identities)
        return tmp_path

    return write
