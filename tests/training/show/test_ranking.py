from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from build_tools.palette import GREEN, RED, TEXT
from training.config.presets import Recipe
from training.data.tracklets import Split
from training.evaluation.features import extract
from training.evaluation.scoring import embed_split
from training.model.network import Network
from training.show.ranking import SearchResult, choose, picture, search


@pytest.fixture
def network(recipe: Recipe) -> Network:
    return Network(recipe.model, identities=4, ops="reference")


@pytest.fixture
def within(split: Split) -> Split:
    """As MARS has it: every tracklet is in the gallery and searched for, one of them of nobody in particular."""
    gallery = (*split.train[:7], replace(split.train[7], person=-1))
    return replace(split, query=gallery[:6], gallery=gallery, protocol="mars-official")


def test_the_nearest_come_first_without_what_is_junk(network: Network, within: Split) -> None:
    features = dict(zip((t.name for t in within.gallery), extract(network, within.gallery), strict=True))
    for row in search(embed_split(network, within), within, top=4):
        counts = [t for t in within.gallery if t.person not in (-1, row.query.person) or t.person == row.query.person]
        counts = [t for t in counts if (t.person, t.camera) != (row.query.person, row.query.camera) and t.person != -1]

        def distance(tracklet: object, one: np.ndarray = features[row.query.name]) -> float:
            other = features[tracklet.name]  # type: ignore[attr-defined]
            return float(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))

        order = sorted(counts, key=distance)
        assert row.gallery == tuple(order[:4])
        assert row.distances == pytest.approx([distance(tracklet) for tracklet in order[:4]], abs=1e-12)
        assert row.hits == tuple(tracklet.person == row.query.person for tracklet in order[:4])
        assert row.first == 1 + next(at for at, t in enumerate(order) if t.person == row.query.person)


def test_the_rows_add_up_to_the_ranking(network: Network, split: Split) -> None:
    embedded = embed_split(network, split)
    cmc = embedded.ranking().cmc
    rows = search(embedded, split, top=2)
    assert [np.mean([row.first <= k for row in rows]) for k in range(1, 5)] == [cmc[k] for k in range(1, 5)]
    some = search(embedded, split, 2, np.array([3, 1]))
    # Distances of fewer queries come from a BLAS call of another size, which may round otherwise.
    near = [replace(row, distances=pytest.approx(row.distances, abs=1e-12)) for row in (rows[3], rows[1])]
    assert some == near


def row_of(split: Split, first: int | None) -> SearchResult:
    return SearchResult(split.query[0], split.gallery[:1], (0.1,), (first == 1,), first)


def test_some_found_at_once_and_the_worst_are_chosen(split: Split) -> None:
    def chosen(firsts: list[int | None], count: int) -> list[int | None]:
        return [row.first for row in choose([row_of(split, first) for first in firsts], count)]

    assert chosen([1, 2, 1, 9, None, 1, 4], 4) == [1, 1, 9, 4]
    assert chosen([1, 2, 1, 9, None, 1, 4], 3) == [1, 1, 9]
    assert chosen([1, 1, 1, 2], 4) == [1, 1, 1, 2]
    assert chosen([1, 3, 5, 4], 4) == [1, 5, 4, 3]
    assert chosen([1, 3, None], 6) == [1, 3]


def test_hits_and_misses_are_told_by_color_line_and_mark(network: Network, split: Split) -> None:
    rows = search(embed_split(network, split), split, top=4)[:2]
    (axes,) = picture(rows).axes
    frames = [to_hex(patch.get_edgecolor()).upper() for patch in axes.patches]
    texts = [text.get_text() for text in axes.texts][2:]
    wanted = [(TEXT, ""), *((GREEN, "✓") if hit else (RED, "✗") for hit in rows[0].hits)]
    assert [frame for frame, _ in wanted] == frames[:5]
    assert [mark for _, mark in wanted[1:]] == [text[-1] for text in texts[1:5]]
    assert [patch.get_linestyle() for patch in axes.patches[1:5]] == ["-" if hit else "--" for hit in rows[0].hits]
    nearest = rows[0].gallery[0]
    assert texts[1].startswith(f"{rows[0].distances[0]:.3f}\nperson {nearest.person} ")
    assert texts[0] == f"{rows[0].query.name}\nperson {rows[0].query.person}\nfirst hit: {rows[0].first}"
    assert len(axes.images) == 10
