from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from training.evaluation import ranking, reranking
from training.evaluation.protocols import QueryGallery, prepare, rank
from training.evaluation.ranking import Ranking, Rerank, cosine_distances
from training.evaluation.reranking import reranked_distances

both_versions = pytest.mark.parametrize("by", ["equations", "published"])


def reranked(features: np.ndarray, queries: np.ndarray, gallery: np.ndarray, **options: Any) -> np.ndarray:
    return torch.cat(list(reranked_distances(features, queries, gallery, **options))).numpy()


def literal(features: np.ndarray, query: int, item: int, k1: int, k2: int, weight: float) -> float:
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

    one, two = v_expanded(query), v_expanded(item)
    shared = sum(min(x, y) for x, y in zip(one, two, strict=True))
    total = sum(max(x, y) for x, y in zip(one, two, strict=True))
    return (1 - weight) * (1 - shared / total) + weight * d[query][item]


def literal_published(queries: np.ndarray, gallery: np.ndarray, k1: int, k2: int, weight: float) -> np.ndarray:
    """Distances (Q, G) of features (Q, D) and (G, D) as the authors' code computes them, one tracklet after another."""
    features = np.concatenate([queries, gallery])
    everyone = range(len(features))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    d = np.array([[((unit[i] - unit[j]) ** 2).sum() for j in everyone] for i in everyone])
    d = np.array([row / row.max() for row in d])
    initial = d.argsort(axis=1, kind="stable")  # each tracklet is at distance 0 of itself, as is its copy

    def reciprocal(i: int, count: int) -> set[int]:
        return {int(j) for j in initial[i, :count] if i in initial[j, :count]}

    encoded = np.zeros_like(d)
    for i in everyone:
        own = reciprocal(i, k1 + 1)
        members = set(own)
        for candidate in own:
            theirs = reciprocal(candidate, round(k1 / 2) + 1)
            if len(theirs & own) > 2 / 3 * len(theirs):
                members.update(theirs)
        weights = {j: math.exp(-d[i, j]) for j in members}
        for j in members:
            encoded[i, j] = weights[j] / sum(weights.values())
    if k2 != 1:
        encoded = np.array([encoded[initial[i, :k2]].mean(axis=0) for i in everyone])

    final = np.empty((len(queries), len(gallery)))
    for i in range(len(queries)):
        for item in range(len(gallery)):
            j = len(queries) + item
            shared = np.minimum(encoded[i], encoded[j]).sum()
            final[i, item] = (1 - weight) * (1 - shared / (2 - shared)) + weight * d[i, j]
    return final


def loose_clusters(seed: int) -> np.ndarray:
    """Features (18, 6) whose neighborhoods overlap: some are joined to others and some not."""
    rng = np.random.default_rng(seed)
    features: np.ndarray = rng.normal(size=(4, 6))[np.arange(18) % 4] + 0.7 * rng.normal(size=(18, 6))
    return features


@pytest.mark.parametrize(("k1", "k2"), [(6, 3), (5, 1), (4, 4), (20, 6)])
def test_reranked_distances_are_those_of_the_paper_s_sets(k1: int, k2: int) -> None:
    features = loose_clusters(seed=k1)
    queries, gallery = np.array([3, 17, 4]), np.array([0, 17, 5, 9, 2])
    found = reranked(features, queries, gallery, k1=k1, k2=k2, weight=0.3)
    wanted = [[literal(features, p, g, k1, k2, 0.3) for g in gallery] for p in queries]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("k1", "k2"), [(6, 3), (5, 1), (4, 4), (7, 2), (20, 6), (30, 1)])
@pytest.mark.parametrize("shared", [True, False], ids=["queries in the gallery", "queries outside"])
def test_published_distances_are_those_of_the_authors_loops(k1: int, k2: int, shared: bool) -> None:
    queries = np.array([3, 17, 4, 0])
    gallery = np.arange(18) if shared else np.setdiff1d(np.arange(18), queries)
    for seed in range(5):
        features = loose_clusters(seed)
        found = reranked(features, queries, gallery, by="published", k1=k1, k2=k2, weight=0.3)
        wanted = literal_published(features[queries], features[gallery], k1, k2, 0.3)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_a_query_in_the_gallery_is_two_neighbors_for_the_published_code() -> None:
    features, queries = loose_clusters(0), np.array([3, 17, 4, 0])
    doubled, first = np.concatenate([features[queries], features]), np.arange(4)
    found = reranked(features, queries, np.arange(18), by="published", k1=6, k2=3)
    as_two = reranked(doubled, first, 4 + np.arange(18), by="published", k1=6, k2=3)
    np.testing.assert_allclose(found, as_two, rtol=0, atol=1e-12)
    assert np.abs(found - reranked(features, queries, np.arange(18), by="equations", k1=6, k2=3)).max() > 0.01


def test_a_neighborhood_shared_by_exactly_two_thirds_joins_by_the_equations_only() -> None:
    # Six on an arc: {1, 2, 3} shares 1 and 2 with R(0, 4) = {0, 1, 2}, and {2, 3, 4} shares 3 and 4 with R(5, 4).
    angle = np.radians([18, 28, 40, 47, 55, 71])
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    first, others = np.array([0]), np.arange(1, 6)
    by_equations = reranked(arc, first, others, by="equations", k1=4, k2=1, weight=0.0)
    by_published = reranked(arc, first, others, by="published", k1=4, k2=1, weight=0.0)
    assert by_equations[0, -1] < 0.9
    assert by_published[0, -1] == 1  # {0, 1, 2} and {3, 4, 5}


def test_encodings_are_scaled_to_sum_one_by_the_published_code_only() -> None:
    near, far = 1 - math.cos(math.radians(30)), 1 - math.cos(math.radians(60))
    arc = np.array([[1, 0], [1 - near, 0.5], [0, 1]])  # at 0, 30 and 90 degrees
    encoded = np.exp(-np.array([[0, near, 1], [near / far, 0, 1]]))  # all are neighbors of all
    scaled = encoded / encoded.sum(axis=1, keepdims=True)
    for by, (one, two) in {"equations": encoded, "published": scaled}.items():
        found = reranked(arc, np.array([0]), np.array([1, 2]), by=by, k1=4, k2=1, weight=0.0)
        wanted = 1 - np.minimum(one, two).sum() / np.maximum(one, two).sum()
        np.testing.assert_allclose(found[0, 0], wanted, rtol=0, atol=1e-12)


@both_versions
def test_blocks_of_queries_are_as_one(by: Rerank, monkeypatch: pytest.MonkeyPatch) -> None:
    features, queries, gallery = np.random.default_rng(0).normal(size=(300, 8)), np.arange(140), np.arange(140, 300)
    in_blocks = reranked(features, queries, gallery, by=by)
    assert in_blocks.shape == (140, 160)
    for module in (ranking, reranking):
        assert module.BLOCK < 140
        monkeypatch.setattr(module, "BLOCK", 300)
    np.testing.assert_allclose(in_blocks, reranked(features, queries, gallery, by=by), rtol=0, atol=1e-12)


@both_versions
def test_reranking_finds_people_that_features_alone_do_not(by: Rerank) -> None:
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(12), 10)
    features = rng.normal(size=(12, 32))[people] + 1.7 * rng.normal(size=(120, 32))
    queries = np.arange(0, 120, 10)
    cameras = np.where(np.isin(np.arange(120), queries), 1, 2)
    labels = QueryGallery(people[queries], cameras[queries], people, cameras, queries)
    masks = prepare("mars-standard-ap", labels)
    plain: Ranking = rank(masks, cosine_distances(features[queries], features))
    better = rank(masks, reranked_distances(features, queries, masks.gallery_rows, by=by), reranked=by)
    assert 0.3 < plain.mean_ap < better.mean_ap - 0.05
    assert (plain.reranked, better.reranked) == (None, by)


@both_versions
def test_equally_far_neighbors_and_fewer_than_k1_are_taken_in_order(by: Rerank) -> None:
    same = reranked(np.ones((40, 3)), np.array([0, 39]), np.arange(40), by=by)
    assert np.isfinite(same).all()
    assert np.array_equal(same, reranked(np.ones((40, 3)), np.array([0, 39]), np.arange(40), by=by))
    two = reranked(np.eye(2), np.array([0]), np.array([1]), by=by)
    assert two.tolist() == [[pytest.approx(0.7 * (1 - 1) + 0.3)]]
