from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from training.config.optim import OptimConfig
from training.config.presets import RECIPES
from training.engine import checkpoint
from training.engine.options import make_options
from training.runtime.errors import UserError
from training.runtime.fields import flatten, update
from training.train import train


def test_paper_trains_as_the_paper_says() -> None:
    paper = RECIPES["paper"]
    batch, model, optim = paper.batch, paper.model, paper.optim
    assert (batch.people, batch.clips, batch.frames, batch.strict_people) == (10, 2, 8, True)
    assert (optim.learning_rate, optim.learning_rate_pretrained, optim.weight_decay) == (0.01, 0.001, 5e-4)
    assert (optim.schedule, optim.warmup_epochs) == ("none", 0)
    assert (paper.loss.margin, model.head_width, model.classifier_width) == (0.4, 256, 512)


def test_official_differs_from_paper_as_the_authors_code_does() -> None:
    paper, official = flatten(RECIPES["paper"]), flatten(RECIPES["official"])
    assert {field: (paper[field], official[field]) for field in paper if paper[field] != official[field]} == {
        "name": ("paper", "official"),
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
    recipe = update(RECIPES["official"], **change)
    assert [epoch for epoch in range(recipe.epochs + 1) if recipe.eval.is_due(epoch, recipe.epochs)] == epochs


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
        update(RECIPES["quick"], **{"people": 8, "clips": 2, **change})


def factors(epochs: int, **given: Any) -> list[float]:
    return [OptimConfig(**given).rate_factor(epoch, epochs) for epoch in range(epochs)]


def test_schedules_and_their_warm_up() -> None:
    assert factors(3) == [1.0, 1.0, 1.0]
    assert factors(4, warmup_epochs=3) == [0.25, 0.5, 0.75, 1.0]
    assert factors(6, schedule="step", step_epochs=2, step_factor=0.5) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert factors(5, schedule="step", step_epochs=2, warmup_epochs=1) == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1])
    cosine = [math.cos(math.pi * part / 8) ** 2 for part in range(4)]  # (1 + cos 2x) / 2 = cos^2 x
    assert factors(4, schedule="cosine") == pytest.approx(cosine)
    assert factors(6, schedule="cosine", warmup_epochs=2)[2:] == pytest.approx(cosine)


def test_a_resumed_run_takes_the_rates_of_its_epoch(small_data: Path, tmp_path: Path) -> None:
    small = {"people": 4, "batches": 1, "device": "cpu", "check_counts": False, "pictures": False}
    data = {"dataset": "ilids-vid", "data_root": small_data, "compare_ops": False, "schedule": "cosine", "epochs": 2}
    train(make_options(output=tmp_path / "run", **small, **data))
    rates = [group["lr"] for group in checkpoint.load(tmp_path / "run").training["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.025, 0.025])  # of its second epoch
    train(make_options(resume=tmp_path / "run", epochs=3, device="cpu", pictures=False))
    rates = [group["lr"] for group in checkpoint.load(tmp_path / "run").training["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.0125, 0.0125])  # 0.05 (1 + cos(2 pi / 3)) / 2
