from __future__ import annotations

import math

import pytest
import torch

from training.config.presets import Recipe
from training.model.losses import Losses
from training.model.network import Output
from training.runtime.errors import UserError
from training.runtime.fields import update

LABELS = torch.tensor([0, 0, 1, 1])
# On a line: each clip's hardest positive and negative can be read off. Triplets: 0.4 + (1, 1, 2, 2) - (2, 1, 1, 3).
FEATURE = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
VIDEO = (0.0 + 0.4 + 1.4 + 0.0) / 4
OUTPUT = Output(FEATURE, strips=None, logits=torch.tensor([[0.0, 1.0]] * 4), auxiliary=None)
RIGHT, WRONG = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))


@pytest.mark.parametrize("ops", ["fast", "reference"])
def test_the_total_is_the_sum_of_parts_computed_by_hand(recipe: Recipe, ops: str) -> None:
    # Two strips: one as the features, one that spreads them tenfold, its middle clips cost.
    strips = torch.stack([FEATURE, 10 * FEATURE], 2)  # (B, C=1, H=2)
    auxiliary = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 4)  # of 2 frames a clip: one right, one wrong
    total, parts = Losses(recipe.loss, ops)(OUTPUT._replace(strips=strips, auxiliary=auxiliary), LABELS)
    wanted = {
        "identity": (RIGHT + WRONG) / 2,
        "auxiliary": (RIGHT + WRONG) / 2,
        "video": VIDEO,
        "part": (VIDEO + (0.4 + 10.4) / 4) / 2,
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(wanted)
    assert total.item() == pytest.approx(sum(wanted.values()))


def test_auxiliary_logits_are_judged_by_their_own_clips_person(recipe: Recipe) -> None:
    sure = torch.tensor([[9.0, 0.0]] * 6 + [[0.0, 9.0]] * 6)  # 3 frames a clip, clip by clip, all right
    _, parts = Losses(recipe.loss, "reference")(OUTPUT._replace(auxiliary=sure), LABELS)
    assert parts["auxiliary"].item() == pytest.approx(math.log(1 + math.exp(-9)), rel=1e-3)


def test_auxiliary_logits_may_be_of_clips_and_have_a_weight(recipe: Recipe) -> None:
    of_clips = OUTPUT._replace(auxiliary=torch.tensor([[0.0, 1.0]] * 4))
    total, parts = Losses(update(recipe, auxiliary_weight=0.25).loss, "reference")(of_clips, LABELS)
    assert parts["auxiliary"].item() == pytest.approx(0.25 * (RIGHT + WRONG) / 2)
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))


def test_a_recipe_without_triplets_has_none(recipe: Recipe) -> None:
    bare = update(recipe, video_loss=False, part_loss=False)
    assert list(Losses(bare.loss, "reference")(OUTPUT, LABELS)[1]) == ["identity"]


def test_labels_of_another_length_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"labels: got shape \(3,\), wanted \(4,\), one a clip"):
        Losses(recipe.loss, "reference")(OUTPUT, LABELS[:3])
