from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from tests.training.evaluation import literal
from training.evaluation.protocols import PROTOCOLS, QueryGallery, prepare, rank
from training.evaluation.ranking import BLOCK, DEEPEST, Ranking, cosine_distances
from training.runtime.errors import UserError

TIES = ("stable", "optimistic", "pessimistic")


def labels_of(
    query: list[tuple[int, int]], gallery: list[tuple[int, int]], places: list[int] | None = None
) -> QueryGallery:
    """Of (person, camera) pairs; no query is in the gallery unless its place is given."""
    people_and_cameras = (np.array(pairs, dtype=np.int64).reshape(-1, 2).T for pairs in (query, gallery))
    (query_people, query_cameras), (people, cameras) = people_and_cameras
    places_or_none = np.array(places or [-1] * len(query), dtype=np.int64)
    return QueryGallery(query_people, query_cameras, people, cameras, places_or_none)


def rank_distances(protocol: str, labels: QueryGallery, distance: np.ndarray, ties: str = "stable") -> Ranking:
    masks = prepare(protocol, labels)
    return rank(masks, torch.from_numpy(distance[:, masks.gallery_rows]).split(3), ties)


def rank_features(protocol: str, labels: QueryGallery, features: np.ndarray, ties: str = "stable") -> Ranking:
    """Of a gallery's features, which holds the queries."""
    masks = prepare(protocol, labels)
    return rank(masks, cosine_distances(features[labels.rows_in_gallery], features[masks.gallery_rows]), ties)


def random_features(labels: QueryGallery, seed: int = 0) -> np.ndarray:
    """256-D noise with something of the person in it, so that precision is neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    person = rng.normal(size=(labels.gallery_people.max() + 2, 256))
    return rng.normal(size=(len(labels.gallery_people), 256)) + 0.35 * person[labels.gallery_people]


def some_of(labels: QueryGallery, step: int) -> QueryGallery:
    """Every so many of the queries, in the whole gallery."""
    queries = (labels.query_people[::step], labels.query_cameras[::step])
    return QueryGallery(*queries, labels.gallery_people, labels.gallery_cameras, labels.rows_in_gallery[::step])


tracklets = st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 2)), min_size=1, max_size=12)


@given(st.data())
def test_every_protocol_is_what_walking_down_the_sorted_gallery_gives(data: st.DataObject) -> None:
    gallery = data.draw(tracklets)
    places = data.draw(st.lists(st.integers(0, len(gallery) - 1), min_size=1, max_size=7))
    labels = labels_of([gallery[place] for place in places], gallery, places)
    distance = data.draw(
        # Few values, so that many distances are equal.
        st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=len(places), max_size=len(places))
    )
    distance = np.array(distance, dtype=np.float64)[:, : len(gallery)] / 3
    for name, rule, counted in (
        ("mars-official", literal.mars, True),
        ("mars-standard-ap", literal.standard, False),
        ("torchreid", literal.standard, False),
    ):
        sides = [literal.good_and_junk(labels, query) for query in range(len(places))]
        if name == "torchreid":
            sides = [(good - set(places), junk | set(places)) for good, junk in sides]
        valid = [query for query, (good, _) in enumerate(sides) if good]
        assume(valid)
        for ties in TIES:
            scores = []
            for query, (good, junk) in enumerate(sides):
                if good:
                    scores.append(rule(literal.order_of(distance[query], good, ties), good, junk))
                elif counted:
                    scores.append((0.0, 10**6))
            ranking = rank_distances(name, labels, distance, ties)
            assert ranking.mean_ap == pytest.approx(np.mean([precision for precision, _ in scores]), rel=1e-12)
            assert ranking.cmc == {k: np.mean([first <= k for _, first in scores]) for k in range(1, DEEPEST + 1)}
            assert (ranking.queries, ranking.valid) == (len(places), len(valid))


@pytest.mark.shared
@pytest.mark.parametrize("ties", ["stable", *(pytest.param(t, marks=pytest.mark.exhaustive) for t in TIES[1:])])
def test_on_mars_the_official_protocol_is_its_authors_rule(mars_with_junk: QueryGallery, ties: str) -> None:
    labels = some_of(mars_with_junk, step=36)
    features = random_features(labels)
    features[1::2] = features[::2]  # equal pairs, mostly of one person, now and then of two
    distance = torch.cat(list(cosine_distances(features[labels.rows_in_gallery], features))).numpy()
    scores = []
    for query in range(len(distance)):
        good, junk = literal.good_and_junk(labels, query)
        scores.append(literal.mars(literal.order_of(distance[query], good, ties), good, junk))
    ranking = rank_features("mars-official", labels, features, ties)
    assert ranking.mean_ap == pytest.approx(np.mean([precision for precision, _ in scores]), rel=1e-12)
    assert ranking.cmc == {k: np.mean([first <= k for _, first in scores]) for k in range(1, DEEPEST + 1)}
    assert 0.01 < ranking.mean_ap < 0.99


@pytest.mark.shared
@pytest.mark.parametrize("protocol", ["mars-standard-ap", "torchreid"])
def test_on_mars_the_standard_average_precision_is_that_of_scikit_learn(mars: QueryGallery, protocol: str) -> None:
    labels = some_of(mars, step=20)
    features, masks = random_features(labels), prepare(protocol, labels)
    distance = torch.cat(list(cosine_distances(features[labels.rows_in_gallery], features[masks.gallery_rows]))).numpy()
    precision = [
        average_precision_score(positive[counts], -row[counts])
        for row, positive, counts in zip(distance, masks.positive.numpy(), masks.not_junk.numpy(), strict=True)
        if positive.any()
    ]
    ranking = rank_features(protocol, labels, features)
    assert ranking.mean_ap == pytest.approx(np.mean(precision), rel=1e-12)
    assert 0.01 < ranking.mean_ap < 0.99


@pytest.mark.shared
def test_the_protocols_count_mars_as_it_is_published(mars: QueryGallery, mars_with_junk: QueryGallery) -> None:
    # Of one matrix of distances: two of other sizes would differ by roundings, and so perhaps in who is nearer.
    features = random_features(mars_with_junk)[:, :32]
    distance = torch.cat(list(cosine_distances(features[mars_with_junk.rows_in_gallery], features)))
    named = np.flatnonzero(mars_with_junk.gallery_people != -1)
    rankings = {}
    for name in ("mars-official", "mars-standard-ap", "torchreid"):
        masks = prepare(name, mars)
        rankings[name] = rank(masks, distance[:, named[masks.gallery_rows]].split(BLOCK))
    assert {name: (r.queries, r.valid, r.gallery, round(r.junk * r.queries)) for name, r in rankings.items()} == {
        "mars-official": (1980, 1980, 11310, 8046),
        "mars-standard-ap": (1980, 1980, 11310, 8046),
        "torchreid": (1980, 1840, 9330, 6066),  # the other 140 match queries only
    }
    # Tracklets of person -1 change nothing but the counts of gallery and junk.
    masks = prepare("mars-official", mars_with_junk)
    whole = rank(masks, distance[:, masks.gallery_rows].split(BLOCK))
    assert (whole.gallery, whole.junk) == (12180, pytest.approx(870 + 8046 / 1980))
    without = rankings["mars-official"]
    assert replace(whole, gallery=without.gallery, junk=without.junk) == without


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.shared
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "protocol",
    ["mars-official", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("mars-standard-ap", "torchreid"))],
)
def test_one_core_ranks_mars_in_under_three_seconds(mars: QueryGallery, protocol: str) -> None:
    features, seconds = random_features(mars), [3.0]
    while min(seconds) >= 3 and len(seconds) < 4:  # of three tries, as many as it takes
        # The processor's time: on a busy machine the clock shows anything, and threads that wait spin.
        started = time.process_time()
        rank_features(protocol, mars, features)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 3


@pytest.mark.parametrize("ties", TIES)
def test_the_order_of_a_gallery_of_unequal_distances_changes_nothing(ties: str) -> None:
    rng = np.random.default_rng(0)
    labels = labels_of(
        [(person, 1) for person in range(8)], [(person % 10, 1 + person % 3) for person in range(60)], list(range(8))
    )
    distance, order = rng.random((8, 60)), rng.permutation(60)
    moved = QueryGallery(
        labels.query_people,
        labels.query_cameras,
        labels.gallery_people[order],
        labels.gallery_cameras[order],
        np.argsort(order)[labels.rows_in_gallery],
    )
    for protocol in ("mars-official", "mars-standard-ap", "torchreid"):
        before = rank_distances(protocol, labels, distance, ties)
        assert rank_distances(protocol, moved, distance[:, order], ties) == before


# Person 1 is looked for by camera 1: of five that count two are right, the first and the last; two more are junk.
TIED = labels_of([(1, 1)], [(1, 1), (1, 2), (7, 1), (-1, 2), (0, 3), (8, 2), (1, 3)], [0])


@pytest.mark.parametrize(
    ("ties", "ranks"), [("stable", (1, 5)), ("optimistic", (1, 2)), ("pessimistic", (4, 5))], ids=TIES
)
def test_if_all_is_equally_far_the_declared_order_of_ties_decides(ties: str, ranks: tuple[int, int]) -> None:
    first, second = ranks
    above = 1.0 if first == 1 else 0.0
    wanted = {
        "mars-official": ((above + 1 / first) / 2 + (1 / (second - 1) + 2 / second) / 2) / 2,
        "mars-standard-ap": (1 / first + 2 / second) / 2,
        "torchreid": (1 / first + 2 / second) / 2,
    }
    for protocol, mean_ap in wanted.items():
        ranking = rank_distances(protocol, TIED, np.full((1, 7), 0.5), ties)
        assert ranking.mean_ap == pytest.approx(mean_ap, rel=1e-12)
        assert ranking.cmc == {k: float(first <= k) for k in range(1, DEEPEST + 1)}
        assert (ranking.ties, ranking.chance) == (ties, 2 / 5)


def test_a_query_without_a_match_counts_as_nothing_or_not_at_all() -> None:
    labels = labels_of([(1, 1), (2, 1)], [(1, 2), (2, 1), (3, 1)])
    distance = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    official = rank_distances("mars-official", labels, distance)
    assert (official.cmc[1], official.mean_ap, official.chance) == (0.5, 0.5, (1 / 3 + 0 / 2) / 2)
    for protocol in ("mars-standard-ap", "torchreid"):
        ranking = rank_distances(protocol, labels, distance)
        assert (ranking.cmc[1], ranking.mean_ap, ranking.chance) == (1.0, 1.0, 1 / 3)
    for protocol in ("mars-official", "mars-standard-ap", "torchreid"):
        ranking = rank_distances(protocol, labels, distance)
        assert (ranking.queries, ranking.valid, ranking.gallery, ranking.junk) == (2, 1, 3, 0.5)
    with pytest.raises(UserError, match="no tracklet of person 2 in the gallery"):
        prepare("single-shot", labels_of([(1, 1), (2, 1)], [(1, 2), (3, 1)]))


def test_torchreid_leaves_every_query_out_of_every_gallery() -> None:
    # Without the queries person 2 has no match left, and person 1 has one, behind the query of person 2.
    labels = labels_of([(1, 1), (2, 1), (2, 2)], [(1, 1), (2, 1), (2, 2), (1, 2)], [0, 1, 2])
    distance = np.array([[0.0, 0.1, 0.2, 0.3]] * 3)
    assert prepare("torchreid", labels).gallery_rows.tolist() == [3]
    ranking = rank_distances("torchreid", labels, distance)
    assert (ranking.cmc[1], ranking.valid, ranking.gallery, ranking.junk) == (1.0, 1, 1, 0.0)
    ranking = rank_distances("mars-standard-ap", labels, distance)
    assert (ranking.cmc[1], ranking.valid, ranking.gallery, ranking.junk) == (0.0, 3, 4, 1.0)


def test_single_shot_searches_the_whole_gallery_of_the_other_camera() -> None:
    labels = labels_of([(1, 1), (2, 1)], [(1, 2), (2, 2), (2, 2), (3, 2)])
    distance = np.array([[0.3, 0.1, 0.2, 0.4], [0.1, 0.2, 0.4, 0.3]])
    ranking = rank_distances("single-shot", labels, distance)
    assert (ranking.cmc[1], ranking.cmc[5], ranking.mean_ap) == (0.0, 1.0, (1 / 3 + (1 / 2 + 2 / 4) / 2) / 2)
    assert (ranking.valid, ranking.gallery, ranking.junk) == (2, 4, 0.0)


def test_chance_is_the_share_of_right_items_among_those_that_count() -> None:
    labels = labels_of([(1, 1), (2, 1)], [(1, 2), (1, 3), (2, 2), (3, 2)])
    for protocol in PROTOCOLS:
        assert rank_distances(protocol, labels, np.ones((2, 4))).chance == (2 / 4 + 1 / 4) / 2


def test_a_protocol_that_does_not_fit_is_one_line() -> None:
    both = labels_of([(1, 1)], [(1, 1), (1, 2)], [0])
    with pytest.raises(UserError, match="single-shot: got a gallery with person 1 by camera 1, as the query"):
        prepare("single-shot", both)
    alone = labels_of([(1, 1)], [(1, 1), (2, 2)], [0])
    for protocol in ("mars-official", "mars-standard-ap", "torchreid"):
        with pytest.raises(UserError, match=f"protocol {protocol}: got 1 queries, none with a match in the gallery"):
            prepare(protocol, alone)
    with pytest.raises(UserError, match="protocol: got 'market', wanted one of single-shot, mars-official"):
        prepare("market", both)
