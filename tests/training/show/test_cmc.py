from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from training.evaluation.protocols import QueryGallery, prepare
from training.evaluation.ranking import DEEPEST, Ranking
from training.runtime.errors import UserError
from training.show.cmc import Curve, chance, names, picture

SEARCH = QueryGallery(
    query_people=np.array([1, 2, 4]),
    query_cameras=np.array([1, 1, 1]),
    gallery_people=np.array([1, 1, 2, 3, 1, -1]),
    gallery_cameras=np.array([1, 2, 2, 2, 3, 1]),
    rows_in_gallery=np.array([0, -1, -1]),
)


@pytest.mark.parametrize(("protocol", "taken"), [("mars-official", [0, 1, 2]), ("mars-standard-ap", [0, 1])])
def test_chance_is_the_mean_over_all_orders_of_the_gallery(protocol: str, taken: list[int]) -> None:
    curves = []
    for query in taken:
        person, camera = SEARCH.query_people[query], SEARCH.query_cameras[query]
        counts = [
            p == person
            for p, c in zip(SEARCH.gallery_people, SEARCH.gallery_cameras, strict=True)
            if p != -1 and (p, c) != (person, camera)
        ]
        curves.append([np.mean([any(order[:k]) for order in permutations(counts)]) for k in range(1, DEEPEST + 1)])
    np.testing.assert_allclose(chance(prepare(protocol, SEARCH)), np.mean(curves, axis=0), atol=1e-12)


def curve(name: str, first: float, gallery: int = 30) -> Curve:
    cmc = {k: min(1.0, first + 0.02 * (k - 1)) for k in range(1, DEEPEST + 1)}
    ranking = Ranking("single-shot", cmc, first / 2, 1 / gallery, 30, 30, gallery, 0.0, "stable", reranked=None)
    return Curve(name, ranking, np.arange(1, DEEPEST + 1) / gallery)


def test_a_line_a_run_and_one_for_the_chance_they_share() -> None:
    (axes,) = picture([curve("ours", 0.7), curve("theirs", 0.5)]).axes
    ours, theirs, level = (line.get_ydata() for line in axes.lines)
    np.testing.assert_allclose(ours, [min(100, 70 + 2 * k) for k in range(20)])
    np.testing.assert_allclose(theirs, [50 + 2 * k for k in range(20)])
    np.testing.assert_allclose(level, [100 * k / 30 for k in range(1, 21)])
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["ours: rank-1 70.0, mAP 35.0", "theirs: rank-1 50.0, mAP 25.0", "chance: rank-1 3.3"]
    assert [text.get_text() for text in axes.texts] == ["theirs", "ours"]
    assert axes.get_title(loc="left") == "single-shot, 30 queries in a gallery of 30"


def test_runs_on_other_galleries_are_told_apart_and_have_a_chance_each() -> None:
    (axes,) = picture([curve("ours", 0.7), curve("theirs", 0.5, gallery=40)]).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[1] == "theirs: rank-1 50.0, mAP 25.0; single-shot, 30 queries in a gallery of 40"
    assert sorted(texts[2:]) == ["chance: rank-1 2.5", "chance: rank-1 3.3"]


def test_runs_are_named_by_what_distinguishes_them() -> None:
    assert names([Path("runs/quick")]) == ["quick"]
    assert names([Path("runs/a/seed-0"), Path("runs/b/seed-0")]) == ["a/seed-0", "b/seed-0"]
    assert names([Path("runs/a"), Path("runs/a/checkpoint-0001")]) == ["a", "a/checkpoint-0001"]
    with pytest.raises(UserError, match="runs: got one of them twice"):
        names([Path("runs/a"), Path("runs/../runs/a")])
