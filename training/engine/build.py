"""The optimiser of a recipe."""

from __future__ import annotations

from torch.optim import SGD

from training.config.recipe import Recipe
from training.model.network import Network


def make_optimizer(network: Network, recipe: Recipe) -> SGD:
    """SGD with Nesterov momentum, in two groups: "backbone", at a rate of its own where it came pretrained, and "new".

    Weight decay is on everything, norms and biases too, as in the authors' code.
    """
    backbone = network.backbone.loadable_parameters()
    ids = {id(parameter) for parameter in backbone}
    new = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    rate = recipe.learning_rate_pretrained if network.backbone.pretrained else recipe.learning_rate
    return SGD(
        [
            {"name": "backbone", "params": backbone, "lr": rate},
            {"name": "new", "params": new, "lr": recipe.learning_rate},
        ],
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe.weight_decay,
    )
