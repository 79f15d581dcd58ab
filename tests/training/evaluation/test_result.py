from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from training.config.presets import RECIPES
from training.config.settings import Settings
from training.engine.run_record import describe
from training.evaluation.ranking import Ranking
from training.evaluation.result import Result, result_table
from training.runtime.fields import update

CMC = {k: 1.0 if k == 20 else 0.8 if k >= 10 else 0.75 if k >= 5 else 0.5 for k in range(1, 21)}
SINGLE_SHOT = Ranking("single-shot", CMC, 0.61, 1 / 30, 30, 30, 30, 0.0, "stable", reranked=None)
MARS = Ranking("torchreid", CMC, 0.61, 0.001, 1980, 1840, 9330, 3.0636, "optimistic", reranked="published")


def made_by(**changes: Any) -> dict[str, Any]:
    """A row of Table 1 by the official recipe, in two groups."""
    return describe(update(Settings(RECIPES["official"]), part_loss=False, bn_groups=2, **changes), processes=1)


def shown(*results: Result) -> list[list[str]]:
    page = io.StringIO()
    Console(file=page, width=100).print(result_table(result.record() for result in results))
    return [line.replace("│", " ").split() for line in page.getvalue().splitlines()]


def test_the_table_shows_every_score_in_percent_with_chance_and_protocol() -> None:
    lines = shown(*(Result(describe(Settings(), 1), epoch, SINGLE_SHOT) for epoch in (0, 7)))
    assert ["untrained", "50.0", "75.0", "80.0", "100.0", "61.0"] in lines
    assert ["after", "epoch", "7", "50.0", "75.0", "80.0", "100.0", "61.0"] in lines
    assert ["chance", "3.3"] in lines
    assert " ".join(lines[0]) == "single-shot, 30 queries (30 valid) in a gallery of 30"
    caption = " ".join(word for line in lines[-2:] for word in line)
    assert caption == "percent; recipe quick, Baseline+RRU+STIM+Lv+Lp, preset paper; ops fast, ties stable"


def test_the_table_says_who_did_not_count_and_by_which_version_distances_were_reranked() -> None:
    text = " ".join(word for line in shown(Result(made_by(resize="pillow"), 900, MARS)) for word in line)
    assert "torchreid, 1980 queries (1840 valid) in a gallery of 9330 (3.1 junk per query)" in text
    assert "percent; recipe official, Baseline+RRU+STIM+Lv, preset official, bn_groups 2 (4); ops fast, ties" in text
    assert text.endswith("ties optimistic, re-ranked (published), resized by Pillow")


def test_a_record_is_flat_and_names_all_that_the_figures_depend_on() -> None:
    record = Result(made_by(), 900, MARS).record()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "recipe": "official",
        "row": "Baseline+RRU+STIM+Lv",
        "preset": "official",
        "changed": ["bn_groups 2 (4)"],
        "ops": "fast",
        "resize": "device",
        "epoch": 900,
        "protocol": "torchreid",
        "ties": "optimistic",
        "reranked": "published",
        "rank-1": 0.5,
        "rank-5": 0.75,
        "rank-10": 0.8,
        "rank-20": 1.0,
        "mAP": 0.61,
        "chance": 0.001,
        "probes": 1980,
        "valid": 1840,
        "gallery": 9330,
        "junk": 3.0636,
    }


def test_the_record_of_distances_as_they_are_says_false() -> None:
    assert Result(made_by(), 900, SINGLE_SHOT).record()["reranked"] is False


def test_a_record_names_how_its_steps_were_computed_where_not_plainly() -> None:
    settings = update(Settings(), amp="bfloat16", channels_last=True, sync_bn=True)
    result = Result(describe(settings, processes=2), 900, MARS)
    switches = ["amp bfloat16 (off)", "channels_last True (False)"]
    assert result.record()["changed"] == [*switches, "sync_bn True (False)", "processes 2 (1)"]
