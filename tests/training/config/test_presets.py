from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from training.config.presets import RECIPES
from training.runtime.errors import UserError


def test_paper_trains_as_the_paper_says() -> None:
    paper = RECIPES["paper"]
    assert (paper.people, paper.clips, paper.frames) == (10, 2, 8)
    assert (paper.learning_rate, paper.learning_rate_pretrained, paper.weight_decay) == (0.01, 0.001, 5e-4)
    assert (paper.margin, paper.head_width, paper.classifier_width, paper.strict_people) == (0.4, 256, 512, True)


def test_official_differs_from_paper_as_the_authors_code_does() -> None:
    paper, official = asdict(RECIPES["paper"]), asdict(RECIPES["official"])
    assert {field: (paper[field], official[field]) for field in paper if paper[field] != official[field]} == {
        "name": ("paper", "official"),
        "preset": ("paper", "official"),
        "prid": ("paper-21", "official-27"),
        "auxiliary": ("frames", "clip"),
        "bn_groups": (1, 4),
        "classifier": ("paper", "official"),
        "sampler": ("pk", "official"),
        "eval_from": (0, 200),
    }
    assert official["auxiliary_weight"] == 1.0


@pytest.mark.parametrize(
    ("change", "epochs"),
    [
        ({"epochs": 900, "eval_every": 20, "eval_from": 200}, [0, *range(200, 901, 20)]),
        ({"epochs": 50, "eval_every": 20, "eval_from": 0}, [0, 20, 40, 50]),
        ({"epochs": 50, "eval_every": 20, "eval_from": 30}, [0, 30, 50]),
        ({"epochs": 7, "eval_every": None, "eval_from": 0}, [0, 7]),
    ],
)
def test_a_network_is_tested_before_and_after_and_every_so_often_from_an_epoch_on(
    change: dict[str, int | None], epochs: list[int]
) -> None:
    recipe = replace(RECIPES["official"], **change)
    assert [epoch for epoch in range(recipe.epochs + 1) if recipe.tested_after(epoch)] == epochs


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
        ({"bn_groups": 16}, "bn_groups: got 16 for 16 clips, wanted at least 2 clips a group"),
        ({"eval_from": -1}, "eval_from: got -1, wanted at least 0"),
        ({"auxiliary_weight": float("nan")}, "auxiliary_weight: got nan, wanted a number, at least 0"),
        ({"auxiliary": "video"}, "auxiliary: got 'video', wanted one of frames, clip"),
    ],
)
def test_an_impossible_recipe_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RECIPES["quick"], **{"people": 8, "clips": 2, **change})
