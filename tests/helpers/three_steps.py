"""Three steps of training and an evaluation, in one process or in several."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from training.config.presets import RECIPES
from training.config.step import StepConfig
from training.data.loading import Batch, make_loader
from training.data.tracklets import Split, Tracklet
from training.engine.build import make_optimizer, make_sampler
from training.engine.trainer import Trainer
from training.evaluation.features import extract
from training.evaluation.scoring import score
from training.model.ghost_norm import groups_of_each
from training.model.losses import Losses
from training.model.network import Network
from training.runtime import distributed
from training.runtime.fields import update

PEOPLE = 6
# By name: changes of the recipe, whether batch statistics are those of all processes, and which operators.
CASES: dict[str, tuple[dict[str, Any], bool, Any]] = {
    "synchronized": ({}, True, "fast"),
    "synchronized, reference": ({}, True, "reference"),
    "in groups": ({"bn_groups": 4}, False, "fast"),
}


class Steps(NamedTuple):
    """Results of three steps.

    clips: of each batch, of each process, the names of its clips.
    gradients: of the first step, by parameter.
    state: the network's state_dict after the third.
    features: of the test tracklets then.
    ranking: of the split then.
    """

    clips: list[list[list[str]]]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    features: np.ndarray
    ranking: Any


def three_steps(case: str) -> Steps:
    """Train a float64 network without dropout by steps of 4 people with 2 clips."""
    changes, sync_bn, ops = CASES[case]
    recipe = update(RECIPES["quick"], people=4, frames=3, batches=3, **changes)
    torch.manual_seed(0)
    processes = distributed.world()
    own = replace(recipe.model, bn_groups=groups_of_each(recipe.model.bn_groups, processes))
    network = Network(own, PEOPLE, ops).double()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = make_optimizer(network, recipe.optim)
    gradients: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
    )
    trainer = Trainer(
        network, Losses(recipe.loss, ops, gather=processes > 1), optimizer, StepConfig(ops, sync_bn=sync_bn)
    )
    split = _noise()
    sampler = make_sampler(recipe, split.train)
    sampler.shard(distributed.rank(), processes)
    batches: list[Batch] = list(make_loader(split.train, sampler, recipe.batch.frames, workers=0))
    trainer.run_epoch(batches, None)  # type: ignore[arg-type]
    clips = [distributed.gathered(batch.clips) for batch in batches]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Steps(clips, gradients[0], state, extract(network, split.query), score(network, split))


def _noise() -> Split:
    rng = np.random.default_rng(0)

    def tracklet(person: int, camera: int) -> Tracklet:
        frames = tuple(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8) for _ in range(3 + (person + camera) % 3))
        return Tracklet(person, camera, frames, f"cam{camera}/person{person:03d}")

    train = tuple(tracklet(person, camera) for person in range(PEOPLE) for camera in (1, 2))
    return Split(train, train[::2], train[1::2], "single-shot", "noise")


def three_steps_of_each(out: Path) -> None:
    """Take the steps of every case in all processes of torchrun; the main one saves the results."""
    with distributed.processes():
        done = {case: three_steps(case)._asdict() for case in CASES}
        sys.stdout.write(f"process {distributed.rank()} is done\n")
        if distributed.is_main():
            torch.save(done, out)
