"""The paper's training, and the rows of its Table 1."""

from __future__ import annotations

from typing import Any

from training.recipes.recipe import Recipe

PAPER = Recipe(
    name="paper",
    preset="paper",
    dataset="ilids-vid",
    prid="paper-21",
    backbone="inception_v3",
    weights="imagenet",
    auxiliary="frames",
    auxiliary_weight=1.0,
    rru="both",
    rru_inputs="appearance+motion",
    bn_groups=1,  # the paper says nothing of it
    head="stim",
    head_width=256,
    classifier="paper",
    classifier_width=512,
    video_loss=True,
    part_loss=True,
    margin=0.4,
    sampler="pk",
    people=10,
    clips=2,
    frames=8,
    strict_people=True,
    batches=None,
    epochs=900,  # the paper gives none; its authors' code trains for 900
    learning_rate=0.01,
    learning_rate_pretrained=0.001,
    weight_decay=5e-4,
    eval_every=20,
    eval_from=0,
    seed=0,
    compare_ops=False,
)

_BASELINE: dict[str, Any] = {"rru": "none", "head": "baseline", "video_loss": False, "part_loss": False}
_VIDEO: dict[str, Any] = {**_BASELINE, "video_loss": True}

# Table 1: what each row changes in a recipe, under the row's name in the paper.
TABLE_1: dict[str, dict[str, Any]] = {
    "Baseline": _BASELINE,
    "Baseline+Lv": _VIDEO,
    "Baseline+LSTM+Lv": {**_VIDEO, "head": "lstm"},
    "Baseline+STIM+Lv": {**_VIDEO, "head": "stim"},
    "Baseline+RRU(s)+Lv": {**_VIDEO, "rru": "spatial"},
    "Baseline+RRU(c)+Lv": {**_VIDEO, "rru": "channel"},
    "Baseline+RRU(ad)+Lv": {**_VIDEO, "rru": "both", "rru_inputs": "appearance"},
    "Baseline+RRU(od)+Lv": {**_VIDEO, "rru": "both", "rru_inputs": "raw"},
    "Baseline+RRU+Lv": {**_VIDEO, "rru": "both"},
    "Baseline+RRU+LSTM+Lv": {**_VIDEO, "rru": "both", "head": "lstm"},
    "Baseline+RRU+STIM+Lv": {**_VIDEO, "rru": "both", "head": "stim"},
    "Baseline+RRU+STIM+Lv+Lp": {**_VIDEO, "rru": "both", "head": "stim", "part_loss": True},
}
