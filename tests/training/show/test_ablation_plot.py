from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from training.ablation import ROWS
from training.show.ablation_plot import STYLES, draw
from training.show.picture import png


def test_every_row_has_a_color_and_a_marker_of_its_own() -> None:
    assert set(STYLES) == set(ROWS)
    for kind in zip(*STYLES.values(), strict=True):
        assert len(set(kind)) == len(ROWS)


@pytest.mark.parametrize("rates", [pytest.param((0.4,), marks=pytest.mark.exhaustive), (0.0, 0.8)])
@pytest.mark.parametrize("seeds", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_the_same_runs_give_the_same_picture(tmp_path: Path, rates: tuple[float, ...], seeds: int) -> None:
    scores = {"rank-1": 0.5, "mAP": 0.6, "chance": 0.1}
    runs = [{"occlusion": o, "row": row, "seed": s, **scores} for o in rates for row in ROWS for s in range(seeds)]
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(png(draw({"people": 20, "epochs": 1, "runs": runs})))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (1440, 600)
