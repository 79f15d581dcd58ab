from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.evaluation.protocols import Search, prepare, rank
from training.evaluation.ranking import Ranking, cosine_distances
from training.evaluation.reranking import reranked_distances


def reranked(features: np.ndarray, probes: np.ndarray, gallery: np.ndarray, **options: float) -> np.ndarray:
    return torch.cat(list(reranked_distances(features, probes, gallery, **options))).numpy()


def literal(features: np.ndarray, probe: int, item: int, k1: int, k2: int, weight: float) -> float:
    """The distance of two tracklets as the paper writes it, with sets."""
    everyone = range(len(features))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    d = [[0.0 if i == j else 1 - float(unit[i] @ unit[j]) for j in everyone] for i in everyone]
    d = [[x / max(row) for x in row] for row in d]

    def n(i: int, k: int) -> set[int]:
        return {i, *sorted(set(everyone) - {i}, key=lambda j: (d[i][j], j))[:k]}

    def r(i: int, k: int) -> set[int]:
        return {j for j in n(i, k) if i in n(j, k)}

    def r_star(i: int) -> set[int]:
        result = set(r(i, k1))
        for q in r(i, k1):
            candidate = r(q, round(k1 / 2))
            if 3 * len(r(i, k1) & candidate) >= 2 * len(candidate):
                result |= candidate
        return result

    def v(i: int) -> list[float]:
        members = r_star(i)
        return [math.exp(-d[i][j]) if j in members else 0.0 for j in everyone]

    def v_expanded(i: int) -> list[float]:
        rows = [v(j) for j in n(i, k2 - 1)]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    one, two = v_expanded(probe), v_expanded(item)
    shared = sum(min(x, y) for x, y in zip(one, two, strict=True))
    total = sum(max(x, y) for x, y in zip(one, two, strict=True))
    return (1 - weight) * (1 - shared / total) + weight * d[probe][item]


@pytest.mark.parametrize(("k1", "k2"), [(6, 3), (5, 1), (4, 4), (20, 6)])
def test_reranked_distances_are_those_of_the_paper_s_sets(k1: int, k2: int) -> None:
    rng = np.random.default_rng(k1)
    # Loose clusters: neighbourhoods overlap, and some are joined to others and some not.
    features = rng.normal(size=(4, 6))[np.arange(18) % 4] + 0.7 * rng.normal(size=(18, 6))
    probes, gallery = np.array([3, 17, 4]), np.array([0, 17, 5, 9, 2])
    found = reranked(features, probes, gallery, k1=k1, k2=k2, weight=0.3)
    wanted = [[literal(features, p, g, k1, k2, 0.3) for g in gallery] for p in probes]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_blocks_of_probes_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(size=(300, 8))  # more than two blocks
    everyone = np.arange(300)
    whole = reranked(features, everyone, everyone)
    assert whole.shape == (300, 300)
    np.testing.assert_allclose(reranked(features, everyone[140:], everyone[::7]), whole[140:, ::7], rtol=0, atol=1e-12)


def test_reranking_finds_people_that_features_alone_do_not() -> None:
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(12), 10)
    features = rng.normal(size=(12, 32))[people] + 1.7 * rng.normal(size=(120, 32))
    probes = np.arange(0, 120, 10)
    cameras = np.where(np.isin(np.arange(120), probes), 1, 2)
    search = Search(people[probes], cameras[probes], people, cameras, probes)
    trial = prepare("mars-standard-ap", search)
    plain: Ranking = rank(trial, cosine_distances(features[probes], features))
    better = rank(trial, reranked_distances(features, probes, trial.kept), reranked=True)
    assert 0.3 < plain.mean_ap < better.mean_ap - 0.05
    assert (plain.reranked, better.reranked) == (False, True)


def test_equally_far_neighbours_and_fewer_than_k1_are_taken_in_order() -> None:
    same = reranked(np.ones((40, 3)), np.array([0, 39]), np.arange(40))
    assert np.isfinite(same).all()
    assert np.array_equal(same, reranked(np.ones((40, 3)), np.array([0, 39]), np.arange(40)))
    two = reranked(np.eye(2), np.array([0]), np.array([1]))
    assert two.tolist() == [[pytest.approx(0.7 * (1 - 1) + 0.3)]]
