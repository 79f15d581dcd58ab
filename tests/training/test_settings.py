from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.checkpoint import Checkpoint
from training.data.tracklets import Split
from training.errors import UserError
from training.recipes import RECIPES
from training.settings import Options, Settings, resolve


def test_what_is_not_given_is_as_the_recipe_says() -> None:
    assert resolve(Options(), None) == Settings(RECIPES["quick"], None, 0, "fast")


def test_options_change_the_recipe_and_a_row_changes_the_model() -> None:
    settings = resolve(Options(recipe="paper", row="Baseline+STIM+Lv", epochs=3, seed=0, split=2), None)
    paper = RECIPES["paper"]
    assert settings.recipe == replace(paper, rru="none", part_loss=False, epochs=3)
    assert settings.split == 2


def test_settings_survive_their_config(split: Split) -> None:
    settings = resolve(Options(data_root=Path("here"), ops="reference", people=4), None)
    config = json.loads(json.dumps(settings.config(split, torch.device("cpu"))))
    assert Settings.of(Checkpoint(config, {}, {})) == settings
    assert config["identities"] == 4
    assert config["environment"]["torch"] == torch.__version__.partition("+")[0]


def test_a_resumed_run_keeps_its_settings_and_may_be_longer() -> None:
    resumed = resolve(Options(people=4, seed=5, data_root=Path("here")), None)
    settings = resolve(Options(recipe="quick", epochs=99), resumed)
    assert settings == replace(resumed, recipe=replace(resumed.recipe, epochs=99))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(recipe="paper"), "trained with recipe 'quick', got 'paper'"),
        (Options(dataset="mot"), "trained with dataset='synthetic', got 'mot'$"),
        (Options(split=1, seed=4), "trained with seed=0, got 4; split=0, got 1$"),
        (Options(row="Baseline+RRU+STIM+Lv"), "trained with part_loss=True, got False$"),
    ],
)
def test_resuming_as_something_else_names_the_difference(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(options, resolve(Options(), None))
