"""The training of the authors' published code (person-reid-lib), wherever it differs from the paper."""

from __future__ import annotations

from dataclasses import replace

from training.recipes.paper import PAPER

OFFICIAL = replace(
    PAPER,
    name="official",
    preset="official",
    prid="official-27",
    auxiliary="clip",
    auxiliary_weight=1.0,
    bn_groups=4,  # four GPUs under DataParallel, 5 clips each
    classifier="official",
    sampler="official",
    epochs=900,
    eval_every=20,
    eval_from=200,  # so after 200, 220, ..., 900
)
