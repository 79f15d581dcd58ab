from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from training.evaluation.ranking import (
    average_precision,
    cosine_distances,
    positive_ranks,
    trapezoid_average_precision,
)


def distance_of(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    return torch.cat(list(cosine_distances(query, gallery))).numpy()


def ranks(distance: list[float], positive: list[int], ties: str, junk: tuple[int, ...] = ()) -> list[int]:
    """The ranks of one query's positives, given by their places, in a gallery that holds junk."""
    places = torch.arange(len(distance))
    masks = (torch.isin(places, torch.tensor(of, dtype=torch.int64))[None] for of in (positive, junk))
    positive_mask, junk_mask = masks
    return positive_ranks(torch.tensor([distance], dtype=torch.float64), positive_mask, ~junk_mask, ties)[0].tolist()


def test_of_equal_distances_the_declared_one_comes_first() -> None:
    distance = [0.5, 0.2, 0.5, 0.5, 0.2]
    assert ranks(distance, [2, 4], "stable") == [2, 4]
    assert ranks(distance, [2, 4], "optimistic") == [1, 3]
    assert ranks(distance, [2, 4], "pessimistic") == [2, 5]


def test_where_all_is_equally_far_only_the_order_of_the_gallery_or_the_declaration_is_left() -> None:
    assert ranks([0.5] * 6, [1, 4], "stable") == [2, 5]
    assert ranks([0.5] * 6, [1, 4], "optimistic") == [1, 2]
    assert ranks([0.5] * 6, [1, 4], "pessimistic") == [5, 6]


def test_junk_moves_nobody_down() -> None:
    assert ranks([0.1, 0.2, 0.3, 0.3, 0.4], [1, 3], "stable", junk=(0, 2)) == [1, 2]
    assert ranks([0.1, 0.2, 0.3, 0.3, 0.4], [1, 3], "pessimistic", junk=(2,)) == [2, 3]


def test_queries_without_and_with_many_positives_go_together() -> None:
    distance = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], dtype=torch.float64)
    positive = torch.tensor([[False, False, False], [True, True, True], [True, False, False]])
    for ties in ("stable", "optimistic", "pessimistic"):
        found = positive_ranks(distance, positive, torch.ones_like(positive), ties)
        assert [of.tolist() for of in found] == [[], [1, 2, 3], [3]]
        (none,) = positive_ranks(distance[:1], positive[:1], torch.ones_like(positive[:1]), ties)
        assert none.tolist() == []


def test_average_precision_of_ranks_one_and_four() -> None:
    assert average_precision(np.array([1, 4])) == (1 / 1 + 2 / 4) / 2


def test_a_trapezoid_reaches_from_the_precision_one_place_above_the_hit() -> None:
    # Above the first place precision is 1; above the fourth it is 1/3: the second place's, 1/2, has no trapezoid.
    assert trapezoid_average_precision(np.array([1, 4])) == ((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2
    assert trapezoid_average_precision(np.array([2])) == (0 + 1 / 2) / 2
    assert trapezoid_average_precision(np.array([1, 2, 3])) == 1


def test_cosine_distance_ignores_length_and_keeps_float64() -> None:
    distance = distance_of(np.array([[1.0, 0.0]]), np.array([[1e-3, 1e-11], [0.0, 7.0], [-2.0, 0.0]]))
    assert distance[0].tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-15)


@pytest.mark.parametrize("queries", [1, 2, 19])
def test_equal_rows_of_the_gallery_are_equally_far(queries: int) -> None:
    for people, features in itertools.product((5, 7, 37, 101), (13, 64, 100, 256)):
        rng = np.random.default_rng(people)
        gallery = np.repeat(rng.normal(size=(people, features)), 5, axis=0)
        distance = distance_of(rng.normal(size=(queries, features)), gallery).reshape(queries, people, 5)
        assert (distance == distance[:, :, :1]).all()


def test_the_order_of_the_gallery_does_not_round_a_distance() -> None:
    rng = np.random.default_rng(0)
    query, gallery, order = rng.normal(size=(300, 100)), rng.normal(size=(37, 100)), rng.permutation(37)
    assert np.array_equal(distance_of(query, gallery)[:, order], distance_of(query, gallery[order]))
