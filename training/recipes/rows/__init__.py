"""The rows of the paper's Table 1, in its order; the four that have figures for MARS are its Table 3."""

from __future__ import annotations

from training.recipes.rows import (
    baseline,
    baseline_lstm_lv,
    baseline_lv,
    baseline_rru_ad_lv,
    baseline_rru_c_lv,
    baseline_rru_lstm_lv,
    baseline_rru_lv,
    baseline_rru_od_lv,
    baseline_rru_s_lv,
    baseline_rru_stim_lv,
    baseline_rru_stim_lv_lp,
    baseline_stim_lv,
)
from training.recipes.rows.row import Row

ROWS: dict[str, Row] = {
    module.ROW.name: module.ROW
    for module in (
        baseline,
        baseline_lv,
        baseline_lstm_lv,
        baseline_stim_lv,
        baseline_rru_s_lv,
        baseline_rru_c_lv,
        baseline_rru_ad_lv,
        baseline_rru_od_lv,
        baseline_rru_lv,
        baseline_rru_lstm_lv,
        baseline_rru_stim_lv,
        baseline_rru_stim_lv_lp,
    )
}

__all__ = ["ROWS", "Row"]
