"""Small datasets on disk, in the layouts the readers expect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.small_sets import write_ilids, write_mars, write_prid


@pytest.fixture
def ilids(tmp_path: Path) -> Path:
    """Four people in the iLIDS-VID layout."""
    return write_ilids(tmp_path)


@pytest.fixture
def prid(tmp_path: Path) -> Path:
    """Seven people in the PRID-2011 layout, of which four are in both protocols."""
    return write_prid(tmp_path)


@pytest.fixture
def mars(tmp_path: Path) -> Path:
    """Three people to train on and two to search for in the MARS layout, with name lists."""
    return write_mars(tmp_path)


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
