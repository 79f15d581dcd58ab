from __future__ import annotations

from typing import Any

from training.reports.ablation_table import markdown


def ablation(seeds: int) -> dict[str, Any]:
    """Two rows at two rates; rank-1 is 10 times the seed more than the row's, in percent."""
    of = {"recipe": "quick", "ops": "fast", "protocol": "single-shot", "probes": 10, "chance": 0.1, "mAP": 0.75}
    runs = [
        {"occlusion": rate, "row": row, "seed": seed, "rank-1": start + 0.1 * seed, **of}
        for rate in (0.0, 0.8)
        for seed in range(seeds)
        for row, start in (("Baseline", 0.2), ("Baseline+Lv", 0.5))
    ]
    environment = {"commit": "0123456789abcdef", "torch": "2.11.0", "device": "x86_64", "threads": 1}
    asked = {"command": "python -m training.ablation", "people": 20, "blur": 0.2, "epochs": 7, "batches": 20}
    return {**asked, "environments": [environment], "runs": runs}


def test_a_row_has_mean_and_deviation_over_the_seeds_at_each_rate() -> None:
    _, _, header, _, *rows = markdown(ablation(3)).splitlines()
    scores = ("rank-1, occlusion 0", "mAP, occlusion 0", "rank-1, occlusion 0.8", "mAP, occlusion 0.8")
    assert header == f"| row | {' | '.join(scores)} |"
    assert rows == [
        "| Baseline | 30.0 ± 10.0 | 75.0 ± 0.0 | 30.0 ± 10.0 | 75.0 ± 0.0 |",
        "| Baseline+Lv | 60.0 ± 10.0 | 75.0 ± 0.0 | 60.0 ± 10.0 | 75.0 ± 0.0 |",
    ]


def test_one_seed_has_no_deviation() -> None:
    table = markdown(ablation(1))
    assert "±" not in table
    assert "one seed" in table


def test_the_table_says_how_it_was_made() -> None:
    caption = markdown(ablation(3)).splitlines()[0]
    for word in (
        "`python -m training.ablation`, commit 0123456789ab;",
        "20 rendered people, 10 to train on and the other 10 held out, blur 0.2",
        "recipe quick, 7 epochs of 20 batches, ops fast",
        "protocol single-shot, last epoch, percent, mean ± standard deviation over 3 seeds",
    ):
        assert word in caption


def test_a_table_made_by_two_versions_names_both() -> None:
    both = ablation(3)
    both["environments"].append({**both["environments"][0], "commit": "fedcba9876543210-dirty"})
    assert "commit 0123456789ab and fedcba987654-dirty;" in markdown(both)
