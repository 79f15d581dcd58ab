"""The paper's training."""

from __future__ import annotations

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
