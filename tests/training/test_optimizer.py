from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.model.backbone import Tiny
from training.model.network import Network
from training.optimizer import make_optimizer
from training.recipes import RECIPES, Recipe


@pytest.mark.parametrize("pretrained", [False, True])
def test_only_layers_out_of_a_weights_file_train_at_their_own_rate(
    recipe: Recipe, tmp_path: Path, pretrained: bool
) -> None:
    torch.save(Tiny("random").net.state_dict(), tmp_path / "tiny.pth")
    recipe = replace(recipe, weights=str(tmp_path / "tiny.pth") if pretrained else "random")
    network = Network(recipe, identities=3, ops="reference")
    groups = {group["name"]: group for group in make_optimizer(network, recipe).param_groups}
    assert groups["new"]["lr"] == recipe.learning_rate
    assert groups["backbone"]["lr"] == (recipe.learning_rate_pretrained if pretrained else recipe.learning_rate)
    assert groups["new"]["nesterov"]
    assert {id(p) for p in groups["backbone"]["params"]} == {id(p) for p in network.backbone.parameters()}
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())


def test_inceptions_new_auxiliary_layer_trains_at_the_base_rate() -> None:
    recipe = replace(RECIPES["paper"], weights="random")
    network = Network(recipe, identities=3, ops="reference")
    new = {id(parameter) for parameter in make_optimizer(network, recipe).param_groups[1]["params"]}
    of_backbone = [name for name, parameter in network.backbone.named_parameters() if id(parameter) in new]
    assert of_backbone == ["net.AuxLogits.fc.weight", "net.AuxLogits.fc.bias"]
