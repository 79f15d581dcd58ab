"""The recipes that `--recipe` names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace

from training.recipes.official import OFFICIAL
from training.recipes.paper import PAPER
from training.recipes.quick import QUICK
from training.recipes.recipe import Recipe
from training.recipes.rows import ROWS

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
