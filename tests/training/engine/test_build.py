from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import inception_v3

from training.config.presets import RECIPES, Recipe
from training.engine.build import make_optimizer
from training.model.backbone import Tiny
from training.model.network import Network
from training.runtime.fields import update


@pytest.mark.parametrize("pretrained", [False, True])
def test_only_layers_out_of_a_weights_file_train_at_their_own_rate(
    recipe: Recipe, tmp_path: Path, pretrained: bool
) -> None:
    torch.save(Tiny("random").net.state_dict(), tmp_path / "tiny.pth")
    recipe = update(recipe, weights=str(tmp_path / "tiny.pth") if pretrained else "random")
    network = Network(recipe.model, identities=3, ops="reference")
    groups = {group["name"]: group for group in make_optimizer(network, recipe.optim).param_groups}
    assert groups["new"]["lr"] == recipe.optim.learning_rate
    assert groups["backbone"]["lr"] == (
        recipe.optim.learning_rate_pretrained if pretrained else recipe.optim.learning_rate
    )
    assert groups["new"]["nesterov"]
    assert {id(p) for p in groups["backbone"]["params"]} == {id(p) for p in network.backbone.parameters()}
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())


@pytest.mark.parametrize("name", ["paper", pytest.param("official", marks=pytest.mark.exhaustive)])
def test_inceptions_new_auxiliary_layer_trains_at_the_base_rate(name: str, tmp_path: Path) -> None:
    torch.save(inception_v3(weights=None, init_weights=False).state_dict(), tmp_path / "inception.pth")
    recipe = update(RECIPES[name], weights=str(tmp_path / "inception.pth"))
    network = Network(recipe.model, identities=3, ops="reference")
    rates = {
        id(p): group["lr"] for group in make_optimizer(network, recipe.optim).param_groups for p in group["params"]
    }
    of_backbone = {name: rates[id(parameter)] for name, parameter in network.backbone.named_parameters()}
    assert [name for name, rate in of_backbone.items() if rate == 0.01] == [
        "net.AuxLogits.fc.weight",
        "net.AuxLogits.fc.bias",
    ]
    assert set(of_backbone.values()) == {0.01, 0.001}
    of_rest = {rates[id(p)] for name, p in network.named_parameters() if not name.startswith("backbone.")}
    assert of_rest == {0.01}


@pytest.mark.parametrize("bn_groups", [1, 3])
def test_weight_decay_is_on_norms_and_biases_too(recipe: Recipe, bn_groups: int) -> None:
    network = Network(update(recipe, bn_groups=bn_groups).model, identities=3, ops="reference")
    optimizer = make_optimizer(network, recipe.optim)
    assert {(group["weight_decay"], group["momentum"]) for group in optimizer.param_groups} == {(5e-4, 0.9)}
    for parameter in network.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [name for name, parameter in network.named_parameters() if not (parameter < 1).all()] == []
