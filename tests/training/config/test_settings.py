from __future__ import annotations

from pathlib import Path

import pytest

from training.config.presets import RECIPES
from training.config.settings import Settings
from training.runtime.errors import UserError
from training.runtime.fields import update


def test_paths_become_absolute_and_names_of_weights_do_not() -> None:
    settings = update(Settings(), weights="some.pth", data_root="here").absolute()
    assert settings.recipe.model.weights == str(Path.cwd() / "some.pth")
    assert settings.source.data_root == Path.cwd() / "here"
    assert Settings(RECIPES["paper"]).absolute() == Settings(RECIPES["paper"])


def test_p_is_lowered_to_the_identities_where_the_recipe_allows_it() -> None:
    quick, paper = Settings(RECIPES["quick"]), Settings(RECIPES["paper"])
    assert quick.clamp_identities(5) == update(quick, people=5)
    for settings, identities in ((quick, 8), (quick, 1), (paper, 5)):
        assert settings.clamp_identities(identities) == settings


def test_shared_statistics_and_groups_exclude_each_other() -> None:
    with pytest.raises(UserError, match="sync_bn: got True with bn_groups=2, wanted one or the other"):
        update(Settings(), sync_bn=True, bn_groups=2)
