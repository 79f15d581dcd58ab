from __future__ import annotations

import torch

from training.config.presets import Recipe
from training.engine.step_timing import compare_ops
from training.model.network import Network


def test_the_step_and_its_rru_are_timed_and_the_network_is_left_alone(recipe: Recipe) -> None:
    network = Network(recipe.model, identities=3, ops="fast")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    step, rru = compare_ops(network, recipe, torch.rand(4, 2, 3, 64, 64), torch.tensor([0, 0, 1, 1]))
    assert 0 < rru.reference < step.reference
    assert 0 < rru.fast < step.fast
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
