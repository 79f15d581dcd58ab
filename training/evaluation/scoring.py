"""Rank a split by a network's features, under a named protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.resizing import Resize
from training.data.tracklets import Split
from training.evaluation.features import CHUNK, extract
from training.evaluation.protocols import ProtocolMasks, QueryGallery, prepare, rank
from training.evaluation.ranking import Floats, Ints, Ranking, Rerank, Ties, cosine_distances
from training.evaluation.reranking import reranked_distances, rows_to_rerank
from training.model.network import Network
from training.runtime import distributed
from training.runtime.terminal import progress


@dataclass(frozen=True)
class EmbeddedSplit:
    """A split's features and the protocol to rank them by.

    masks: which gallery items count for each query.
    features: (N, D) float64, each tracklet once; the rows `masks.gallery_rows` are the gallery's.
    query_rows: (Q,) int64, the queries' rows.
    device: where distances are computed.
    """

    masks: ProtocolMasks
    features: Floats
    query_rows: Ints
    device: torch.device

    def distances(self, queries: Ints | slice = slice(None)) -> Iterator[Tensor]:
        """Yield the cosine distances (q, G') of all queries or of some, block by block."""
        query, gallery = self.features[self.query_rows[queries]], self.features[self.masks.gallery_rows]
        return cosine_distances(query, gallery, self.device)

    def ranking(self, ties: Ties = "stable", *, rerank: Rerank | None = None) -> Ranking:
        """Rank the gallery for each query; arguments as of `score`."""
        if rerank is None:
            with progress("Ranking", len(self.query_rows), "queries") as advance:
                return rank(self.masks, self.distances(), ties, advance=advance)
        features, gallery = self.features, self.masks.gallery_rows
        rows = rows_to_rerank(features, self.query_rows, gallery, rerank)
        with progress("Re-ranking", rows, "rows") as advance:
            distances = reranked_distances(features, self.query_rows, gallery, self.device, by=rerank, advance=advance)
            return rank(self.masks, distances, ties, reranked=rerank)


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
    """Rank the split's gallery for each of its queries, by cosine distance, on the network's device.

    Of several processes each extracts its share of the features, the main one ranks, and all get the ranking.

    Args:
        network: extracts the features.
        split: queries and gallery.
        protocol: one of `PROTOCOLS`; None for the split's own.
        ties: how equal distances are counted.
        rerank: the version of k-reciprocal re-ranking to apply before ranking; None for no re-ranking.
        chunk: frames that go through the backbone at once.
        resize: who resizes frames.

    Raises:
        UserError: the protocol does not fit the split, a frame cannot be read, or a feature is not finite.
    """
    embedded = embed_split(network, split, protocol=protocol, chunk=chunk, resize=resize)
    return distributed.from_main(lambda: embedded.ranking(ties, rerank=rerank))


def embed_split(
    network: Network, split: Split, *, protocol: str | None = None, chunk: int = CHUNK, resize: Resize = "device"
) -> EmbeddedSplit:
    """Extract the features of a split; arguments and errors are those of `score`.

    A query that is itself in the gallery, the very same tracklet, goes through the network once. Of several processes
    each extracts its share, and all get all features.
    """
    labels = _labels_of(split)
    masks = prepare(protocol or split.protocol, labels)  # first: extraction may take hours
    inside = labels.rows_in_gallery >= 0
    outside = [query for query, known in zip(split.query, inside, strict=True) if not known]
    features = extract(network, [*split.gallery, *outside], chunk, resize)
    query_rows = np.where(inside, labels.rows_in_gallery, len(split.gallery) - 1 + np.cumsum(~inside))
    return EmbeddedSplit(masks, features, query_rows, next(network.parameters()).device)


def _labels_of(split: Split) -> QueryGallery:
    row_of = {id(tracklet): row for row, tracklet in enumerate(split.gallery)}
    return QueryGallery(
        query_people=np.array([tracklet.person for tracklet in split.query], dtype=np.int64),
        query_cameras=np.array([tracklet.camera for tracklet in split.query], dtype=np.int64),
        gallery_people=np.array([tracklet.person for tracklet in split.gallery], dtype=np.int64),
        gallery_cameras=np.array([tracklet.camera for tracklet in split.gallery], dtype=np.int64),
        rows_in_gallery=np.array([row_of.get(id(tracklet), -1) for tracklet in split.query], dtype=np.int64),
    )
