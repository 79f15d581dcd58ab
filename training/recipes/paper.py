"""The paper's training."""

from __future__ import annotations

from training.recipes.recipe import Recipe

PAPER = Recipe(
    name="paper",
    dataset="ilids-vid",
    backbone="inception_v3",
    weights="imagenet",
    rru="both",
    rru_inputs="appearance+motion",
    bn_groups=1,
    head="stim",
    head_width=256,
    classifier_width=512,
    video_loss=True,
    part_loss=True,
    margin=0.4,
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
    prid="paper-21",
    seed=0,
    compare_ops=False,
)
