"""A run's parts from its settings: sampler, optimizer, trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.optim import SGD

from training.config.optim import OptimConfig
from training.config.recipe import Recipe
from training.config.settings import Settings
from training.data.sampler import IdentitySampler, OfficialSampler, PKSampler
from training.data.tracklets import Tracklet
from training.engine import checkpoint
from training.engine.checkpoint import Checkpoint
from training.engine.trainer import Trainer
from training.model.ghost_norm import groups_of_each
from training.model.losses import Losses
from training.model.network import Network
from training.model.weights import first_line, load_weights
from training.runtime import distributed
from training.runtime.errors import UserError


def make_sampler(recipe: Recipe, tracklets: Sequence[Tracklet]) -> IdentitySampler:
    """Make the sampler of a recipe.

    Args:
        recipe: its batches and its seed.
        tracklets: the ones to sample from.

    Raises:
        UserError: there are too few people.
    """
    batch = recipe.batch
    kind = {"pk": PKSampler, "official": OfficialSampler}[batch.sampler]
    return kind(tracklets, batch.people, batch.clips, batch.frames, recipe.seed, batch.batches)


def make_optimizer(network: Network, config: OptimConfig) -> SGD:
    """Make SGD with Nesterov momentum, in two groups: "backbone", at a rate of its own if pretrained, and "new".

    Weight decay is on everything, norms and biases too, as in the authors' code.
    """
    backbone = network.backbone.loadable_parameters()
    ids = {id(parameter) for parameter in backbone}
    new = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    rate = config.learning_rate_pretrained if network.backbone.pretrained else config.learning_rate
    return SGD(
        [
            {"name": "backbone", "params": backbone, "lr": rate},
            {"name": "new", "params": new, "lr": config.learning_rate},
        ],
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
    )


def make_trainer(settings: Settings, people: int, device: torch.device, resumed: Checkpoint | None) -> Trainer:
    """Make a trainer at its beginning, or where a checkpoint left it; the random generators too.

    Args:
        settings: of the run.
        people: identities of the classifier.
        device: of the network.
        resumed: the checkpoint to continue from, if any.

    Raises:
        UserError: weights cannot be read, or the checkpoint is of another training.
    """
    recipe, step = settings.recipe, settings.step
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    processes = distributed.world()
    model = replace(recipe.model, bn_groups=groups_of_each(recipe.model.bn_groups, processes))
    if resumed:  # its tensors come from the checkpoint: no weights file is needed, nor a download
        model = replace(model, weights="random")
    network = Network(model, people, step.ops, step.cuda_graph).to(device)
    losses = Losses(recipe.loss, step.ops, gather=processes > 1)
    trainer = Trainer(network, losses, make_optimizer(network, recipe.optim), step)
    if resumed:
        load_weights(network, resumed.model, str(resumed.folder))
        try:
            trainer.load_state_dict(resumed.training)
            checkpoint.restore_random_state(resumed.training["random"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{resumed.folder / 'training.pt'}: not of this training ({first_line(error)})") from error
    return trainer


def set_learning_rates(optimizer: SGD, config: OptimConfig, epoch: int, epochs: int) -> None:
    """Set the learning rates of an epoch.

    Args:
        optimizer: of `make_optimizer`; each group keeps the rate that it begins with as "initial_lr".
        config: the schedule.
        epoch: epochs completed before it.
        epochs: of the whole run.
    """
    factor = config.rate_factor(epoch, epochs)
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
