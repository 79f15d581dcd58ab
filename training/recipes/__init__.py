"""The recipes that `--recipe` names."""

from __future__ import annotations

from training.recipes.paper import PAPER
from training.recipes.quick import QUICK
from training.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (QUICK, PAPER)}

__all__ = ["RECIPES", "Recipe"]
