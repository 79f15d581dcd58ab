from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from training.data.loading import make_loader
from training.data.sampler import make_sampler
from training.data.tracklets import Split
from training.logging import RunLog
from training.model.losses import Losses
from training.model.network import Network
from training.optimizer import make_optimizer
from training.recipes import RECIPES
from training.trainer import Trainer

PARTS = ["identity", "auxiliary", "video", "part"]


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("quick", {"people": 2}, ["identity", "video", "part"]),
        ("paper", {"people": 2}, PARTS),
        # The least that 4 groups allow: 2 clips each, as the classifier's batch norm has no statistics of one.
        ("official", {"people": 4}, PARTS),
    ],
)
def test_every_recipe_trains_two_steps_that_move_all_it_holds(
    split: Split, tmp_path: Path, name: str, change: dict[str, Any], parts: list[str]
) -> None:
    recipe = replace(RECIPES[name], weights="random", frames=2, batches=2, **change)
    network = Network(recipe, len(split.train_people), "fast")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    trainer = Trainer(network, Losses(recipe, "fast"), make_optimizer(network, recipe))
    loader = make_loader(split.train, make_sampler(recipe, split.train), recipe.frames, workers=0)
    with RunLog(tmp_path, Console(file=io.StringIO()), epochs=1) as log:
        trainer.run_epoch(loader, log)
    assert [list(record)[4 : 4 + len(parts)] for record in log.records] == [parts, parts]
    assert (trainer.epoch, trainer.step) == (1, 2)
    still = [key for key, tensor in network.state_dict().items() if tensor.equal(before[key])]
    assert still == []
