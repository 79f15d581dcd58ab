"""A network and a split to a ranking, by a named protocol."""

from __future__ import annotations

import numpy as np

from training import distributed
from training.data.tracklets import Split
from training.evaluation.features import CHUNK, extract
from training.evaluation.protocols import Search, prepare, rank
from training.evaluation.ranking import Ranking, Ties, cosine_distances
from training.evaluation.reranking import reranked_distances
from training.model.network import Network


def score(
    network: Network,
    split: Split,
    *,
    protocol: str | None = None,
    ties: Ties = "stable",
    rerank: bool = False,
    chunk: int = CHUNK,
) -> Ranking:
    """Rank the split's gallery for each of its probes, by cosine distance, on the network's device.

    A probe that is itself in the gallery, the very same tracklet, goes through the network once. Of several processes
    each extracts its share of the features, one ranks, and all get the ranking.

    Args:
        network: whose features are compared.
        split: probes and gallery.
        protocol: one of `PROTOCOLS`; None for the split's own.
        ties: how equal distances are counted.
        rerank: by k-reciprocal encoding, before ranking.
        chunk: frames that go through the backbone at once.

    Raises:
        UserError: the protocol does not fit the split, a frame cannot be read, or a feature is not finite.
    """
    search = _search(split)
    trial = prepare(protocol or split.protocol, search)  # first: extraction may take hours
    inside = search.places >= 0
    outside = [probe for probe, known in zip(split.probe, inside, strict=True) if not known]
    features = extract(network, [*split.gallery, *outside], chunk)
    probes = np.where(inside, search.places, len(split.gallery) - 1 + np.cumsum(~inside))
    device = next(network.parameters()).device

    def ranking() -> Ranking:
        if rerank:
            distances = reranked_distances(features, probes, trial.kept, device)
        else:
            distances = cosine_distances(features[probes], features[trial.kept], device)
        return rank(trial, distances, ties, reranked=rerank)

    return distributed.from_main(ranking)


def _search(split: Split) -> Search:
    place = {id(tracklet): at for at, tracklet in enumerate(split.gallery)}
    return Search(
        probe_people=np.array([tracklet.person for tracklet in split.probe], dtype=np.int64),
        probe_cameras=np.array([tracklet.camera for tracklet in split.probe], dtype=np.int64),
        gallery_people=np.array([tracklet.person for tracklet in split.gallery], dtype=np.int64),
        gallery_cameras=np.array([tracklet.camera for tracklet in split.gallery], dtype=np.int64),
        places=np.array([place.get(id(tracklet), -1) for tracklet in split.probe], dtype=np.int64),
    )
