from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from training.config.presets import RECIPES
from training.config.table1 import ROWS, paper_figures
from training.engine import checkpoint
from training.engine.options import make_options
from training.engine.resumable_run import run
from training.show.board import pictures


@pytest.mark.parametrize("name", RECIPES)
def test_no_two_rows_are_the_same_and_the_last_is_the_recipe(name: str) -> None:
    rows = [row.apply(RECIPES[name]) for row in ROWS.values()]
    assert len(set(rows)) == len(rows) == 12
    assert rows[-1] == RECIPES[name]


def test_a_row_s_name_says_what_it_is_made_of() -> None:
    for name, row in ROWS.items():
        made = row.apply(RECIPES["paper"])
        assert (made.loss.video_loss, made.loss.part_loss) == ("+Lv" in name, "+Lp" in name)
        assert made.model.head == ("stim" if "STIM" in name else "lstm" if "LSTM" in name else "baseline")
        assert (made.model.rru != "none") == ("RRU" in name)


def test_the_paper_s_figures_rise_from_rank_1_to_rank_20_and_mars_has_four_rows() -> None:
    assert [name for name in ROWS if "mars" in paper_figures(name)] == [
        "Baseline",
        "Baseline+STIM+Lv",
        "Baseline+RRU+STIM+Lv",
        "Baseline+RRU+STIM+Lv+Lp",
    ]
    for name in ROWS:
        assert list(paper_figures(name))[:2] == ["ilids-vid", "prid-2011"]
        for dataset, figures in paper_figures(name).items():
            assert len(figures) == 3 + (dataset == "mars")
            assert list(figures) == sorted(figures) and figures[-1] <= 100
    assert paper_figures("Baseline")["ilids-vid"] == (57.7, 78.9, 91.3)
    assert paper_figures("Baseline+RRU+STIM+Lv+Lp")["mars"] == (72.7, 84.4, 93.2, 96.3)


# By default what trains in no other test: a head of each kind, an RRU and none, all losses, and the official recipe's
# sampler and groups with the whole model; each row's own network takes a backward in model/test_network.py.
BY_DEFAULT = {
    "paper": ("Baseline", "Baseline+RRU+LSTM+Lv", "Baseline+RRU+STIM+Lv+Lp"),
    "official": ("Baseline+RRU+STIM+Lv+Lp",),
}


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        pytest.param(row, recipe, marks=() if row in rows else pytest.mark.exhaustive)
        for recipe, rows in BY_DEFAULT.items()
        for row in ROWS
    ],
)
def test_every_row_of_every_preset_trains_two_steps_on_the_tiny_backbone(
    small_data: Path, tmp_path: Path, row: str, recipe: Literal["paper", "official"]
) -> None:
    small = {"people": 4, "batches": 2, "epochs": 1, "device": "cpu", "check_counts": False}
    where = {"dataset": "ilids-vid", "data_root": small_data, "output": tmp_path / "run"}
    draw = pictures if recipe == "paper" else None  # each row's once
    results = run(make_options(recipe=recipe, row=row, backbone="tiny", **where, **small), draw)
    assert [result["epoch"] for result in results] == [0, 1]
    assert {(result["row"], result["preset"]) for result in results} == {(row, recipe)}
    assert checkpoint.load(tmp_path / "run").training["step"] == 2
