"""The recipes that `--recipe` names."""

from __future__ import annotations

from training.recipes.official import OFFICIAL
from training.recipes.paper import PAPER
from training.recipes.quick import QUICK
from training.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (QUICK, PAPER, OFFICIAL)}

__all__ = ["RECIPES", "Recipe"]
