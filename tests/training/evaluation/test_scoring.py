from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config.presets import Recipe
from training.data.tracklets import Split
from training.evaluation.features import extract
from training.evaluation.ranking import Rerank
from training.evaluation.scoring import score
from training.model.network import Network
from training.runtime.errors import UserError

VERSIONS: tuple[Rerank | None, ...] = (None, "equations", "published")


@pytest.fixture
def network(recipe: Recipe) -> Network:
    return Network(recipe.model, identities=4, ops="reference")


@pytest.fixture
def clones(split: Split) -> Split:
    """The queries, seen by another camera exactly as by the first."""
    return replace(split, gallery=tuple(replace(tracklet, camera=2) for tracklet in split.query))


@pytest.fixture
def within(split: Split) -> Split:
    """As MARS has it: every tracklet is in the gallery, two of them are searched for."""
    return replace(split, query=split.train[1:5:3], gallery=split.train, protocol="mars-official")


def count_frames(network: Network) -> list[int]:
    """A list that grows by the number of frames of each pass through the backbone."""
    frames: list[int] = []
    network.backbone.register_forward_hook(lambda module, inputs, output: frames.append(len(inputs[0])))
    return frames


def test_a_gallery_of_the_queries_look_alikes_is_found_without_fail(network: Network, clones: Split) -> None:
    for rerank in VERSIONS:
        ranking = score(network, clones, rerank=rerank)
        assert (ranking.cmc[1], ranking.mean_ap, ranking.chance) == (1.0, 1.0, 0.25)
        assert (ranking.protocol, ranking.ties, ranking.reranked) == ("single-shot", "stable", rerank)


def test_the_split_s_protocol_gives_way_to_a_named_one(network: Network, within: Split) -> None:
    assert score(network, within).protocol == "mars-official"
    ranking = score(network, within, protocol="torchreid", ties="pessimistic")
    assert (ranking.protocol, ranking.ties) == ("torchreid", "pessimistic")
    assert (ranking.queries, ranking.valid, ranking.gallery, ranking.junk) == (2, 2, len(within.gallery) - 2, 0.0)


@pytest.mark.parametrize("rerank", VERSIONS)
def test_a_query_in_the_gallery_goes_through_the_network_once(
    network: Network, within: Split, rerank: Rerank | None
) -> None:
    frames = count_frames(network)
    inside = score(network, within, rerank=rerank)
    assert sum(frames) == sum(len(tracklet.frames) for tracklet in within.gallery)
    assert inside.junk == 1.0  # itself
    if rerank is None:  # a second node of the same tracklet would be one neighbor more
        again = score(network, replace(within, query=tuple(replace(query) for query in within.query)))
        assert again == inside
        assert sum(frames) > 2 * sum(len(tracklet.frames) for tracklet in within.gallery)


@pytest.mark.parametrize("rerank", VERSIONS)
def test_progress_counts_to_the_end(
    network: Network, within: Split, rerank: Rerank | None, counted: list[tuple[object, ...]]
) -> None:
    score(network, within, rerank=rerank)
    (_, frames, of_frames, _), (work, rows, of_rows, _) = counted
    assert frames == of_frames == sum(len(tracklet.frames) for tracklet in within.gallery)
    assert work == ("Re-ranking" if rerank else "Ranking")
    # To rerank, each node is embedded and encoded; a query in the gallery is two nodes of the published version's.
    assert rows == of_rows == {None: 2, "equations": 2 * 8 + 2, "published": 2 * (8 + 2) + 2}[rerank]


def test_queries_inside_and_outside_the_gallery_keep_their_own_features(network: Network, split: Split) -> None:
    query = (split.train[4], split.train[0], split.train[7], split.train[2])  # the second and the last are outside
    mixed = replace(split, query=query, gallery=(*split.train[3:], split.train[1]))
    ranking = score(network, mixed, protocol="mars-standard-ap")
    features = {
        id(tracklet): feature for tracklet, feature in zip(split.train, extract(network, split.train), strict=True)
    }
    firsts = []
    for tracklet in query:
        near = {}
        for other in mixed.gallery:
            if (other.person, other.camera) != (tracklet.person, tracklet.camera):
                one, two = features[id(tracklet)], features[id(other)]
                near[other.person == tracklet.person, other.name] = (
                    one @ two / np.linalg.norm(one) / np.linalg.norm(two)
                )
        order = sorted(near, key=near.__getitem__, reverse=True)
        firsts.append(1 + next(place for place, (right, _) in enumerate(order) if right))
    assert ranking.cmc[1] == np.mean([first <= 1 for first in firsts])
    assert ranking.mean_ap == pytest.approx(np.mean([1 / first for first in firsts]), rel=1e-12)


def test_a_protocol_that_does_not_fit_is_refused_before_any_frame_is_read(network: Network, within: Split) -> None:
    frames = count_frames(network)
    with pytest.raises(UserError, match="protocol single-shot: got a gallery with person"):
        score(network, within, protocol="single-shot")
    assert frames == []


def test_chunks_reach_the_extraction(network: Network, clones: Split) -> None:
    frames = count_frames(network)
    score(network, clones, chunk=2)
    assert max(frames) == 2


def test_a_diverged_network_is_an_error_not_a_rank(network: Network, split: Split) -> None:
    with torch.no_grad():
        network.head.net[0].weight.fill_(torch.nan)
    with pytest.raises(UserError, match="its feature is not finite"):
        score(network, split)
