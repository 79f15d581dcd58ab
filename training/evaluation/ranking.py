"""Distances, ranks of a query's positives in the gallery, and average precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Ties = Literal["stable", "optimistic", "pessimistic"]
"""Order of equal distances: the earlier in the gallery first, the positive first, the positive last."""

Rerank = Literal["equations", "published"]
"""Versions of k-reciprocal re-ranking: by the paper's equations, or as the authors' code computes it."""

TOP = (1, 5, 10, 20)  # the ranks of a CMC that tables show
DEEPEST = 20  # the last rank of a CMC
BLOCK = 128  # queries ranked at once: about 0.1 GB of temporaries in a gallery of MARS's size
_PAIRS = 64  # ties resolved at once, each against the whole gallery


@dataclass(frozen=True)
class Ranking:
    """CMC and mAP under a protocol.

    protocol: its name.
    cmc: for k from 1 to DEEPEST, the share of queries with a match among the k nearest.
    mean_ap: mean over queries of the average precision.
    chance: rank-1 of a random order of the gallery.
    queries: their number.
    valid: number of queries with a match that is not junk.
    gallery: number of tracklets in it, junk included.
    junk: number of these that are junk to a query, on average over the queries.
    ties: how equal distances were counted.
    reranked: version by which the distances were re-ranked; None if they were not.
    """

    protocol: str
    cmc: dict[int, float]
    mean_ap: float
    chance: float
    queries: int
    valid: int
    gallery: int
    junk: float
    ties: Ties
    reranked: Rerank | None


def cosine_distances(query: Floats, gallery: Floats, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yield 1 - cosine of each pair in float64, in blocks of queries; equal gallery rows are equally far.

    This holds for rows equal to the last bit: a row and three times that row differ by rounding.

    Args:
        query, gallery: features (Q, D) and (G, D).
        device: where to compute.

    Yields:
        (q, G) float64 on the device: the next q <= BLOCK queries' distances.
    """
    query_unit, gallery_unit = (normalize(torch.from_numpy(of).to(device), dim=1) for of in (query, gallery))
    # A matrix product may round equal columns differently, depending on their position: pass each distinct row once.
    distinct, places = torch.unique(gallery_unit, dim=0, return_inverse=True)
    for block in torch.split(query_unit, BLOCK):
        yield (1 - block @ distinct.T)[:, places]


def positive_ranks(distance: Tensor, positive: Tensor, not_junk: Tensor, ties: Ties) -> list[Ints]:
    """Return the ranks, ascending from 1, of each query's positives: 1 + the number of items before it, without junk.

    Only the positives are sorted; the gallery is not.

    Args:
        distance: (q, G) float64, finite.
        positive: (q, G) bool, items that show the query's person and are not junk.
        not_junk: (q, G) bool.
        ties: order of equal distances.

    Returns:
        One array per query, with one rank per positive.
    """
    device, (queries, items) = distance.device, distance.shape
    query, place = positive.nonzero(as_tuple=True)  # by query, then by place in the gallery
    matches = query.bincount(minlength=queries)
    slot = torch.arange(len(query), device=device) - (matches.cumsum(0) - matches)[query]
    # Rows are padded to the longest: padding is infinitely far, and so is every item that cannot precede a positive.
    own = distance.new_full((queries, max(1, int(matches.max()))), torch.inf)  # (q, P)
    own[query, slot] = distance[query, place]
    places = torch.zeros_like(own, dtype=torch.int64)
    places[query, slot] = place
    own, order = own.sort(dim=1, stable=True)
    others = torch.where(not_junk & ~positive, distance, torch.inf)

    first = torch.searchsorted(own, others, right=ties != "pessimistic")  # the first positive behind each
    before = _count_before(first, own.shape[1])
    if ties == "stable":
        # Few queries have another item as near as a positive: only those are counted again, pair by pair.
        equal = (own.gather(1, (first - 1).clamp(min=0)) == others) & others.isfinite()
        rows = equal.any(1).nonzero().ravel()
        tied = _count_before(torch.searchsorted(own[rows], others[rows]), own.shape[1]) != before[rows]
        column, places = torch.arange(items, device=device), places.gather(1, order)
        for pairs in torch.split((tied & own[rows].isfinite()).nonzero(), _PAIRS):
            row, rank = rows[pairs[:, 0]], pairs[:, 1]
            equal = others[row] == own[row, rank][:, None]
            before[row, rank] += (equal & (column < places[row, rank][:, None])).count_nonzero(1)
    ranks = (before + torch.arange(1, own.shape[1] + 1, device=device)).cpu().numpy()
    return [row[:count] for row, count in zip(ranks, matches.tolist(), strict=True)]


def _count_before(first: Tensor, positives: int) -> Tensor:
    """Return (q, P), the number of items before each positive, from the first positive behind each item (q, G).

    That is 0 to P, where P means none.
    """
    queries = len(first)
    first = first + (positives + 1) * torch.arange(queries, device=first.device)[:, None]
    counted = first.flatten().bincount(minlength=queries * (positives + 1)).view(queries, positives + 1)
    return counted.cumsum(1)[:, :positives]


def average_precision(ranks: Ints) -> float:
    """Mean, over the positives, of the precision at each one's rank. Ranks ascend from 1."""
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def trapezoid_average_precision(ranks: Ints) -> float:
    """Area under the precision-recall curve by trapezoids, as MARS's `compute_AP`. Ranks ascend from 1.

    Recall grows at hits only, by 1/n each. A hit's trapezoid spans from the precision at the rank before, 1 before the
    first rank, to the precision at the hit.
    """
    hits = np.arange(1, len(ranks) + 1)
    above = np.where(ranks == 1, 1.0, (hits - 1) / np.maximum(ranks - 1, 1))
    return float(((above + hits / ranks) / 2).mean())
