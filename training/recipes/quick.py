"""The whole method in two minutes on two CPU cores: small frames, small network, few people."""

from __future__ import annotations

from training.recipes.recipe import Recipe

QUICK = Recipe(
    name="quick",
    preset="paper",
    dataset="synthetic",
    prid="paper-21",
    backbone="tiny",  # it has no auxiliary classifier, so that part of L_c is absent
    weights="random",
    auxiliary="frames",
    auxiliary_weight=1.0,
    rru="both",
    rru_inputs="appearance+motion",
    bn_groups=1,
    head="stim",
    head_width=64,
    classifier="paper",
    classifier_width=128,
    video_loss=True,
    part_loss=True,
    margin=0.4,
    sampler="pk",
    people=8,
    clips=2,
    frames=8,
    strict_people=False,
    batches=20,
    epochs=7,
    learning_rate=0.05,
    learning_rate_pretrained=0.005,
    weight_decay=5e-4,
    eval_every=None,
    eval_from=0,
    seed=0,
    compare_ops=True,
)
