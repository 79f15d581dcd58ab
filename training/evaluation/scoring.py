"""A network and a split to a ranking, by a named protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.resizing import Resize
from training.data.tracklets import Split
from training.evaluation.features import CHUNK, extract
from training.evaluation.protocols import Search, Trial, prepare, rank
from training.evaluation.ranking import Floats, Ints, Ranking, Rerank, Ties, cosine_distances
from training.evaluation.reranking import reranked_distances, rows_to_rerank
from training.model.network import Network
from training.runtime import distributed
from training.runtime.terminal import progress


@dataclass(frozen=True)
class Compared:
    """Tracklets, laid out for a search, and what they are compared by.

    trial: who is looked for among whom.
    features: (N, D) float64, each tracklet's once; the rows `trial.kept` are the gallery's.
    probes: (Q,) int64, the probes' rows.
    device: where distances are computed.
    """

    trial: Trial
    features: Floats
    probes: Ints
    device: torch.device

    def distances(self, probes: Ints | slice = slice(None)) -> Iterator[Tensor]:
        """Cosine distances (q, G') of all probes or of some, block by block."""
        return cosine_distances(self.features[self.probes[probes]], self.features[self.trial.kept], self.device)

    def ranking(self, ties: Ties = "stable", *, rerank: Rerank | None = None) -> Ranking:
        """How well the features find people; arguments as `score` takes them."""
        if rerank is None:
            with progress("Ranking", len(self.probes), "queries") as advance:
                return rank(self.trial, self.distances(), ties, advance=advance)
        rows = rows_to_rerank(self.features, self.probes, self.trial.kept, rerank)
        with progress("Re-ranking", rows, "rows") as advance:
            distances = reranked_distances(
                self.features, self.probes, self.trial.kept, self.device, by=rerank, advance=advance
            )
            return rank(self.trial, distances, ties, reranked=rerank)


def score(
    network: Network,
    split: Split,
    *,
    protocol: str | None = None,
    ties: Ties = "stable",
    rerank: Rerank | None = None,
    chunk: int = CHUNK,
    resize: Resize = "device",
) -> Ranking:
    """Rank the split's gallery for each of its probes, by cosine distance, on the network's device.

    Of several processes each extracts its share of the features, one ranks, and all get the ranking.

    Args:
        network: whose features are compared.
        split: probes and gallery.
        protocol: one of `PROTOCOLS`; None for the split's own.
        ties: how equal distances are counted.
        rerank: the version of k-reciprocal re-ranking to apply before ranking; None for no re-ranking.
        chunk: frames that go through the backbone at once.
        resize: who resizes frames.

    Raises:
        UserError: the protocol does not fit the split, a frame cannot be read, or a feature is not finite.
    """
    compared = compare(network, split, protocol=protocol, chunk=chunk, resize=resize)
    return distributed.from_main(lambda: compared.ranking(ties, rerank=rerank))


def compare(
    network: Network, split: Split, *, protocol: str | None = None, chunk: int = CHUNK, resize: Resize = "device"
) -> Compared:
    """Extract what `score` ranks by; arguments and errors are its own.

    A probe that is itself in the gallery, the very same tracklet, goes through the network once. Of several processes
    each extracts its share, and all get all features.
    """
    search = _search(split)
    trial = prepare(protocol or split.protocol, search)  # first: extraction may take hours
    inside = search.places >= 0
    outside = [probe for probe, known in zip(split.query, inside, strict=True) if not known]
    features = extract(network, [*split.gallery, *outside], chunk, resize)
    probes = np.where(inside, search.places, len(split.gallery) - 1 + np.cumsum(~inside))
    return Compared(trial, features, probes, next(network.parameters()).device)


def _search(split: Split) -> Search:
    place = {id(tracklet): at for at, tracklet in enumerate(split.gallery)}
    return Search(
        probe_people=np.array([tracklet.person for tracklet in split.query], dtype=np.int64),
        probe_cameras=np.array([tracklet.camera for tracklet in split.query], dtype=np.int64),
        gallery_people=np.array([tracklet.person for tracklet in split.gallery], dtype=np.int64),
        gallery_cameras=np.array([tracklet.camera for tracklet in split.gallery], dtype=np.int64),
        places=np.array([place.get(id(tracklet), -1) for tracklet in split.query], dtype=np.int64),
    )
