from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from training.config.presets import Recipe
from training.data.loading import make_loader
from training.data.tracklets import Split
from training.engine.build import make_optimizer, make_sampler
from training.engine.metrics_log import RunLog
from training.engine.trainer import Trainer
from training.model.finite import first_not_finite
from training.model.losses import Losses
from training.model.network import Network
from training.runtime.errors import UserError

CLIPS = torch.rand(4, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def spoil(network: nn.Module, weight: str, value: float = float("nan")) -> None:
    """Set one number of one weight."""
    with torch.no_grad():
        network.get_parameter(weight).view(-1)[0] = value


def test_a_finite_forward_has_no_such_module(recipe: Recipe) -> None:
    assert first_not_finite(Network(recipe.model, identities=3, ops="fast"), CLIPS) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "module"),
    [
        ("backbone.net.3.weight", "backbone.net.3"),  # plain outputs, the first of many that are spoilt
        ("rru.transition.weight", "rru"),  # a NamedTuple out of a module whose own modules are not called
        ("head.net.4.bias", "head.net.4"),
        ("classifier.4.weight", "classifier.4"),
    ],
)
@pytest.mark.parametrize("ops", ["fast", "reference"])
def test_the_first_module_in_order_of_execution_is_named(
    recipe: Recipe, ops: Any, weight: str, module: str, value: float
) -> None:
    network = Network(recipe.model, identities=3, ops=ops)
    if not module.startswith("classifier"):
        spoil(network, "classifier.0.weight")  # later: it does not count
    spoil(network, weight, value)
    assert first_not_finite(network, CLIPS) == module


def test_frames_that_are_not_finite_are_named_before_any_module(recipe: Recipe) -> None:
    network = Network(recipe.model, identities=3, ops="fast")
    clips = CLIPS.clone()
    clips[2, 1, 0, 5, 7] = float("inf")
    assert first_not_finite(network, clips) == "the frames"


class Divides(nn.Module):
    """A network that itself, outside any module within it, divides by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, None]]:
        y = self.linear(x)
        return y, (y / 0, None)


def test_what_the_network_does_itself_goes_by_its_class() -> None:
    assert first_not_finite(Divides(), torch.rand(3, 2)) == "Divides"


def test_the_network_is_left_as_it_was(recipe: Recipe) -> None:
    network = Network(recipe.model, identities=3, ops="fast")
    spoil(network, "head.net.3.weight")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first_not_finite(network, CLIPS)
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "head.net.3.weight")
    assert network.training
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_compiled_backbone_is_looked_into(recipe: Recipe) -> None:
    network = Network(recipe.model, identities=3, ops="fast")
    network.backbone.compile(backend="eager")
    network(CLIPS)
    spoil(network, "backbone.net.6.weight")
    assert first_not_finite(network, CLIPS) == "backbone.net.6"


def trainer_of(recipe: Recipe, split: Split) -> tuple[Trainer, Any]:
    network = Network(recipe.model, len(split.train_people), "fast")
    loader = make_loader(split.train, make_sampler(recipe, split.train), recipe.batch.frames, workers=0)
    return Trainer(network, Losses(recipe.loss, "fast"), make_optimizer(network, recipe.optim)), loader


def test_training_ends_with_the_step_the_clips_and_the_module(recipe: Recipe, split: Split, tmp_path: Path) -> None:
    trainer, loader = trainer_of(recipe, split)
    spoil(trainer.network, "head.net.3.weight")
    with (
        RunLog(tmp_path, Console(file=io.StringIO()), epochs=2) as log,
        pytest.raises(UserError, match=r"^epoch 1, step 1: the identity loss is nan on cam") as raised,
    ):
        trainer.run_epoch(loader, log)
    assert str(raised.value).endswith("]; first not finite: head.net.3; last good epoch: 0")
    assert str(raised.value).count("/person") == recipe.batch.people * recipe.batch.clips
    assert "\n" not in str(raised.value)


def test_a_loss_alone_that_is_not_finite_is_told_as_that(recipe: Recipe, split: Split, tmp_path: Path) -> None:
    trainer, loader = trainer_of(recipe, split)
    spoil(trainer.network, "classifier.4.bias", -1e38)  # finite logits, between which lies more than a float32 holds
    with torch.no_grad():
        trainer.network.classifier[4].bias[1:] = 3e38
    with RunLog(tmp_path, Console(file=io.StringIO()), epochs=2) as log, pytest.raises(UserError) as raised:
        trainer.run_epoch(loader, log)
    assert "; first not finite: the loss itself; last good epoch: 0" in str(raised.value)
