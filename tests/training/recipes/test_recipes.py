from __future__ import annotations

from dataclasses import replace

import pytest

from training.errors import UserError
from training.recipes import RECIPES


def test_paper_trains_as_the_paper_says() -> None:
    paper = RECIPES["paper"]
    assert (paper.people, paper.clips, paper.frames) == (10, 2, 8)
    assert (paper.learning_rate, paper.learning_rate_pretrained, paper.weight_decay) == (0.01, 0.001, 5e-4)
    assert (paper.margin, paper.head_width, paper.classifier_width, paper.strict_people) == (0.4, 256, 512, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"people": 1}, "people: got 1, wanted at least 2"),
        ({"epochs": 0}, "epochs: got 0, wanted at least 1"),
        ({"batches": 0}, "batches: got 0, wanted at least 1"),
        ({"seed": -1}, "seed: got -1, wanted 0 to 4294967295"),
        ({"seed": 2**32}, "seed: got 4294967296, wanted 0 to 4294967295"),
        ({"head": "tail"}, "head: got 'tail', wanted one of baseline, lstm, stim"),
        ({"rru": "none"}, "part_loss: got True with rru='none'"),
        ({"bn_groups": 3}, "bn_groups: got 3, which does not divide 16 clips"),
    ],
)
def test_an_impossible_recipe_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RECIPES["quick"], **{"people": 8, "clips": 2, **change})
