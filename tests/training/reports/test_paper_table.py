from __future__ import annotations

import io

import pytest
from rich.console import Console

from training.reports.paper_table import compare, markdown, terminal

SCORES = ("rank-1", "rank-5")


def record(epoch: int, first: float, fifth: float) -> dict[str, float]:
    return {"epoch": epoch, "rank-1": first, "rank-5": fifth}


RUNS = {
    0: [record(0, 0.9, 0.9), record(20, 0.5, 0.8), record(40, 0.7, 0.7), record(60, 0.3, 0.6)],
    1: [record(0, 0.9, 0.9), record(20, 0.7, 0.9), record(40, 0.1, 0.7), record(60, 0.5, 0.6)],
}


def test_the_best_epoch_is_that_of_the_mean_over_splits_and_not_each_split_s_own() -> None:
    row = compare("Baseline", RUNS, {"rank-1": 57.7, "rank-5": 78.9}, SCORES)
    assert row["splits"] == [0, 1]
    assert (row["best"]["epoch"], row["last"]["epoch"]) == (20, 60)
    assert row["best"]["rank-1"]["mean"] == pytest.approx(60)  # 70 with each split's own best
    assert row["best"]["rank-1"]["deviation"] == pytest.approx(14.142, abs=1e-3)  # of a sample
    assert row["best"]["rank-5"]["minus_paper"] == pytest.approx(85 - 78.9)
    assert row["last"]["rank-1"]["minus_paper"] == pytest.approx(40 - 57.7)


def test_one_split_has_no_deviation_and_no_run_has_no_figures() -> None:
    one, none = compare("A", {3: RUNS[0]}, None, SCORES), compare("B", {}, None, SCORES)
    assert one["last"]["rank-1"] == {"mean": pytest.approx(30), "deviation": None, "minus_paper": None}
    assert "last" not in none
    lines = markdown("title", [one, none], SCORES, ["a note"]).splitlines()
    assert lines[4] == "| A | rank-1 | 1 | 30.0 | - | 70.0 | - | 40 | - |"
    assert lines[6] == "| B | rank-1 | 0 | - | - | - | - | - | - |"
    assert lines[-1] == "a note"


def test_the_widest_table_fits_in_80_columns() -> None:
    full = {3: [record(900, 1.0, 1.0)], 4: [record(900, 0.0, 1.0)]}
    row = compare("Baseline+RRU+STIM+Lv+Lp", full, {"rank-1": 100.0, "rank-5": 99.9}, SCORES)
    page = io.StringIO()
    Console(file=page, width=80).print(terminal("title", [row], SCORES))
    (line,) = [line for line in page.getvalue().splitlines() if "+Lp" in line]
    assert line.split() == ["Baseline+RRU+STIM+Lv+Lp", "rank-1", *["50.0", "±70.7", "-50.0"] * 2, "100.0"]


def test_an_epoch_that_only_some_splits_were_tested_after_is_not_the_best() -> None:
    runs = {0: [record(20, 0.9, 1.0), record(40, 0.5, 1.0)], 1: [record(40, 0.5, 1.0)]}
    row = compare("A", runs, None, SCORES)
    assert (row["best"]["epoch"], row["best"]["rank-1"]["mean"]) == (40, pytest.approx(50))
