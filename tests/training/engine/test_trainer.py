from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from training.config.presets import RECIPES, Recipe
from training.data.loading import Batch, make_loader
from training.data.tracklets import Split
from training.engine.build import make_optimizer, make_sampler
from training.engine.metrics_log import RunLog
from training.engine.trainer import Trainer
from training.model.losses import Losses
from training.model.network import Network
from training.runtime.fields import update

PARTS = ["identity", "auxiliary", "video", "part"]


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("quick", {"people": 2}, ["identity", "video", "part"]),
        # With Inception, which model/test_network.py and recipes/test_rows.py try apart from each other by default.
        pytest.param("paper", {"people": 2}, PARTS, marks=pytest.mark.exhaustive),
        # The least that 4 groups allow: 2 clips each, as the classifier's batch norm has no statistics of one.
        pytest.param("official", {"people": 4}, PARTS, marks=pytest.mark.exhaustive),
    ],
)
def test_every_recipe_trains_two_steps_that_move_all_it_holds(
    split: Split, tmp_path: Path, name: str, change: dict[str, Any], parts: list[str]
) -> None:
    recipe = update(RECIPES[name], weights="random", frames=2, batches=2, **change)
    network = Network(recipe.model, len(split.train_people), "fast")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    trainer = Trainer(network, Losses(recipe.loss, "fast"), make_optimizer(network, recipe.optim))
    loader = make_loader(split.train, make_sampler(recipe, split.train), recipe.batch.frames, workers=0)
    with RunLog(tmp_path, Console(file=io.StringIO()), epochs=1) as log:
        trainer.run_epoch(loader, log)
    assert [list(record)[4 : 4 + len(parts)] for record in log.records] == [parts, parts]
    assert (trainer.epoch, trainer.step) == (1, 2)
    still = [key for key, tensor in network.state_dict().items() if tensor.equal(before[key])]
    assert still == []


class Slow(list[Batch]):
    """Batches that are waited for."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(0.2)
            yield batch


@pytest.mark.parametrize("kind", [Slow, list])
def test_data_wait_is_the_time_until_the_loader_had_its_batch(
    split: Split, recipe: Recipe, tmp_path: Path, kind: type[list[Batch]]
) -> None:
    network = Network(recipe.model, len(split.train_people), "fast")
    trainer = Trainer(network, Losses(recipe.loss, "fast"), make_optimizer(network, recipe.optim))
    batches = kind(make_loader(split.train, make_sampler(recipe, split.train), recipe.batch.frames, workers=0))
    with RunLog(tmp_path, Console(file=io.StringIO()), epochs=1) as log:
        trainer.run_epoch(batches, log)  # type: ignore[arg-type]
    seconds = [len(batches[0].frames) / record["frames_per_second"] for record in log.records]
    waited = min(record["data_wait"] * spent for record, spent in zip(log.records, seconds, strict=True))
    assert waited >= 0.19 if kind is Slow else waited < 0.1
