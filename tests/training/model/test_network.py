from __future__ import annotations

import pytest
import torch
from torch import nn

from training.config.presets import RECIPES, Recipe
from training.config.table1 import ROWS
from training.model.losses import Losses
from training.model.network import Network
from training.runtime.errors import UserError
from training.runtime.fields import update

FRAMES = torch.rand(4, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_table_1_has_its_losses_and_trains_all_it_holds(recipe: Recipe, row: str) -> None:
    of_row = ROWS[row].apply(recipe)
    network = Network(of_row.model, identities=3, ops="reference")
    total, parts = Losses(of_row.loss, "reference")(network(FRAMES), LABELS)
    total.backward()
    wanted = ["identity"] + ["video"] * ("Lv" in row) + ["part"] * ("Lp" in row)
    assert list(parts) == wanted
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    assert (network.rru is not None) == ("RRU" in row)


@pytest.mark.parametrize("inputs", ["appearance+motion", "appearance", "raw"])
def test_fast_and_reference_operators_make_the_same_network(recipe: Recipe, inputs: str) -> None:
    recipe = update(recipe, rru_inputs=inputs)
    found = {}
    state = Network(recipe.model, identities=3, ops="reference").state_dict()
    for ops in ("fast", "reference"):
        network = Network(recipe.model, identities=3, ops=ops)
        network.load_state_dict(state)
        network.classifier[3].p = 0.0
        total, _ = Losses(recipe.loss, ops)(network.double()(FRAMES.double()), LABELS)
        total.backward()
        found[ops] = {name: weight.grad for name, weight in network.named_parameters()} | {"loss": total.detach()}
    torch.testing.assert_close(found["fast"], found["reference"], rtol=1e-7, atol=1e-9)


def test_in_eval_mode_a_clip_does_not_depend_on_its_batch(recipe: Recipe) -> None:
    network = Network(recipe.model, identities=3, ops="reference").eval().double()
    with torch.no_grad():
        together = network(FRAMES.double()).feature
        alone = torch.cat([network(clip[None].double()).feature for clip in FRAMES])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("shape", [(4, 3, 1, 64, 64), (4, 3, 3, 64, 32), (12, 3, 64, 64)])
def test_frames_of_another_shape_are_refused(recipe: Recipe, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"frames: got shape .*, wanted \(clips, frames a clip, 3, 64, 64\)"):
        Network(recipe.model, identities=3, ops="reference")(torch.rand(shape))


def test_the_paper_adds_the_auxiliary_cross_entropy_and_trains_all_it_holds() -> None:
    paper = update(RECIPES["paper"], weights="random")
    network = Network(paper.model, identities=3, ops="fast")
    total, parts = Losses(paper.loss, "fast")(network(torch.rand(2, 2, 3, 299, 299)), LABELS[1:3])
    total.backward()
    assert list(parts) == ["identity", "auxiliary", "video", "part"]
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


def test_training_starts_from_no_opinion(recipe: Recipe) -> None:
    network = Network(recipe.model, identities=50, ops="reference")
    _, parts = Losses(recipe.loss, "reference")(network(FRAMES), LABELS)
    assert parts["identity"].item() == pytest.approx(torch.tensor(50.0).log().item(), rel=0.02)


def test_the_official_classifier_leaks_and_has_a_norm_that_begins_near_one(recipe: Recipe) -> None:
    width = 4096
    classifiers = {
        kind: Network(
            update(recipe, classifier=kind, classifier_width=width).model, identities=3, ops="fast"
        ).classifier
        for kind in ("paper", "official")
    }
    kinds = {kind: [type(layer) for layer in layers] for kind, layers in classifiers.items()}
    assert kinds["paper"] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    assert kinds["official"] == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout, nn.Linear]
    assert all(layers[3].p == 0.5 for layers in classifiers.values())
    first, norm, leaky, _, last = classifiers["official"]
    assert leaky.negative_slope == 0.1
    assert first.weight.std().item() == pytest.approx((2 / width) ** 0.5, rel=0.02)  # kaiming, fan_out
    assert (norm.weight.mean().item(), norm.weight.std().item()) == pytest.approx((1, 0.02), rel=0.05)
    assert last.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert all(not tensor.any() for tensor in (first.bias, norm.bias, last.bias))
    assert torch.equal(classifiers["paper"][1].weight, torch.ones(width))
