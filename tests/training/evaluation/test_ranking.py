from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import UserError
from training.evaluation.ranking import TOP, average_precision, cosine_distance, positive_ranks, single_shot

# Few directions, so that many distances are equal to the last bit.
items = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([(1, 0), (0, 1), (-1, 0), (2, 0)])), min_size=1, max_size=9
)


@given(probe=items, gallery=items)
def test_single_shot_is_what_sorting_the_gallery_gives(probe: list, gallery: list) -> None:
    gallery = gallery + [(person, (0, -1)) for person in range(4)]
    firsts, precisions = [], []
    for person, feature in probe:
        distance = [1 - np.dot(feature, g) / (np.hypot(*feature) * np.hypot(*g)) for _, g in gallery]
        order = sorted(range(len(gallery)), key=lambda j: distance[j])  # stable: of equals, the earlier first
        hits = [place for place, j in enumerate(order, start=1) if gallery[j][0] == person]
        firsts.append(hits[0])
        precisions.append(sum(n / place for n, place in enumerate(hits, start=1)) / len(hits))
    people, features = zip(*probe, strict=True)
    gallery_people, gallery_features = zip(*gallery, strict=True)
    ranking = single_shot(
        np.array(features, float), np.array(people), np.array(gallery_features, float), np.array(gallery_people)
    )
    assert ranking.mean_ap == pytest.approx(np.mean(precisions), rel=1e-12)
    assert ranking.cmc == {k: np.mean([first <= k for first in firsts]) for k in TOP}
    assert (ranking.probes, ranking.gallery) == (len(probe), len(gallery))


def test_of_equal_distances_the_earlier_in_the_gallery_comes_first() -> None:
    distance = np.array([0.5, 0.2, 0.5, 0.5, 0.2])
    assert positive_ranks(distance, np.array([False, False, True, False, True])).tolist() == [2, 4]


def test_average_precision_of_ranks_one_and_four() -> None:
    assert average_precision(np.array([1, 4])) == (1 / 1 + 2 / 4) / 2


def test_cosine_distance_ignores_length_and_keeps_float64() -> None:
    distance = cosine_distance(np.array([[1.0, 0.0]]), np.array([[1e-3, 1e-11], [0.0, 7.0], [-2.0, 0.0]]))
    assert distance[0].tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-15)


@pytest.mark.parametrize("probes", [1, 2, 19])
def test_equal_rows_of_the_gallery_are_equally_far(probes: int) -> None:
    for people, features in itertools.product((5, 7, 37, 101), (13, 64, 100, 256)):
        rng = np.random.default_rng(people)
        gallery = np.repeat(rng.normal(size=(people, features)), 5, axis=0)
        distance = cosine_distance(rng.normal(size=(probes, features)), gallery).reshape(probes, people, 5)
        assert (distance == distance[:, :, :1]).all()


def test_chance_is_the_share_of_right_items_in_the_gallery() -> None:
    gallery_people = np.array([1, 1, 2, 3])
    ranking = single_shot(np.eye(2, 3), np.array([1, 2]), np.ones((4, 3)), gallery_people)
    assert ranking.chance == (2 / 4 + 1 / 4) / 2


def test_a_person_missing_from_the_gallery_is_named() -> None:
    with pytest.raises(UserError, match="person 7"):
        single_shot(np.eye(2), np.array([1, 7]), np.eye(2), np.array([1, 2]))
