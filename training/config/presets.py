"""The recipes that `--recipe` names: the paper's, its authors' code's, and a quick one."""

from __future__ import annotations

from dataclasses import replace

from training.config.recipe import Recipe
from training.config.table1 import ROWS
from training.runtime.fields import differing, update

PAPER = Recipe(name="paper")

# The training of the authors' published code (person-reid-lib), wherever it differs from the paper.
OFFICIAL = update(
    PAPER,
    name="official",
    prid="official-27",
    auxiliary="clip",
    bn_groups=4,  # four GPUs under DataParallel, 5 clips each
    classifier="official",
    sampler="official",
    eval_from=200,  # so after 200, 220, ..., 900
)

# The whole method in two minutes on two CPU cores: small frames, small network, few people.
QUICK = update(
    PAPER,
    name="quick",
    dataset="synthetic",
    backbone="tiny",  # it has no auxiliary classifier, so that part of L_c is absent
    weights="random",
    head_width=64,
    classifier_width=128,
    people=8,
    strict_people=False,
    batches=20,
    epochs=7,
    learning_rate=0.05,
    learning_rate_pretrained=0.005,
    eval_every=None,
    compare_ops=True,
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (QUICK, PAPER, OFFICIAL)}


def with_tiny_backbone(recipe: Recipe) -> Recipe:
    """Return a recipe with the tiny backbone, and the weights, widths and learning rates that quick has for it."""
    model, optim = QUICK.model, QUICK.optim
    return replace(
        recipe,
        model=replace(
            recipe.model,
            backbone=model.backbone,
            weights=model.weights,
            head_width=model.head_width,
            classifier_width=model.classifier_width,
        ),
        optim=replace(
            recipe.optim,
            learning_rate=optim.learning_rate,
            learning_rate_pretrained=optim.learning_rate_pretrained,
        ),
    )


def row_of(recipe: Recipe) -> str | None:
    """Return the name of the table's row that a recipe trains, or None if it is none."""
    return next((name for name, row in ROWS.items() if row.apply(recipe) == recipe), None)


def diff_from_preset(recipe: Recipe, *, any_length: bool = False) -> list[str]:
    """List the differences from the recipe of this name with this row's changes, each as "field value (was)".

    Args:
        recipe: on any dataset.
        any_length: leave out how long it trains and when it is evaluated.
    """
    row, preset = row_of(recipe), RECIPES[recipe.name]
    preset = ROWS[row].apply(preset) if row else preset
    preset = replace(preset, data=replace(preset.data, dataset=recipe.data.dataset))
    if any_length:
        preset = replace(preset, epochs=recipe.epochs, eval=recipe.eval)
    return [f"{name} {now} ({before})" for name, (before, now) in differing(preset, recipe).items()]
