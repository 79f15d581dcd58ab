"""The recipes that `--recipe` names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace

from training.config.recipe import Recipe
from training.config.table1 import ROWS

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


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (QUICK, PAPER, OFFICIAL)}

# How long a run goes on, and what it does beside training: a run that is continued may change it.
FREE = frozenset({"epochs", "eval_every", "eval_from", "compare_ops"})


def row_of(recipe: Recipe) -> str | None:
    """The name of the table's row that a recipe trains, if it is one."""
    return next((name for name, row in ROWS.items() if row.changes.items() <= asdict(recipe).items()), None)


def changed(recipe: Recipe, but_for: Collection[str] = ("dataset",)) -> list[str]:
    """What is otherwise than in the recipe of this name with this row's changes, each as "field value (was)"."""
    row = row_of(recipe)
    was, now = asdict(replace(RECIPES[recipe.name], **(ROWS[row].changes if row else {}))), asdict(recipe)
    return [f"{name} {now[name]} ({was[name]})" for name in now if now[name] != was[name] and name not in but_for]


__all__ = ["FREE", "RECIPES", "ROWS", "Recipe", "changed", "row_of"]
