from __future__ import annotations

import io

from rich.console import Console

from training.evaluation.ranking import Ranking
from training.evaluation.result import Result, result_table


def test_the_table_shows_every_score_in_percent_with_chance_and_protocol() -> None:
    cmc = {1: 0.5, 5: 0.75, 10: 0.8, 20: 1.0}
    results = [
        Result("quick", "fast", epoch, Ranking("single-shot", cmc, mean_ap, chance=1 / 30, probes=30, gallery=30))
        for epoch, mean_ap in ((0, 0.123), (7, 0.61))
    ]
    page = io.StringIO()
    Console(file=page, width=100).print(result_table(result.record() for result in results))
    lines = [line.replace("│", " ").split() for line in page.getvalue().splitlines()]
    assert ["untrained", "50.0", "75.0", "80.0", "100.0", "12.3"] in lines
    assert ["after", "epoch", "7", "50.0", "75.0", "80.0", "100.0", "61.0"] in lines
    assert ["chance", "3.3"] in lines
    assert lines[0] == ["single-shot,", "30", "probes", "in", "a", "gallery", "of", "30"]
    assert lines[-1] == ["percent;", "recipe", "quick,", "ops", "fast"]
