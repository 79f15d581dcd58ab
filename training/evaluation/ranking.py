"""How high in the gallery a probe finds its own person: distances, ranks of positives, average precision."""

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
"""Who of two equally far comes first: the earlier in the gallery, the positive, the other."""

Rerank = Literal["equations", "published"]
"""Versions of k-reciprocal re-ranking: by the paper's equations, or as the authors' code computes it."""

TOP = (1, 5, 10, 20)  # what tables show of a CMC
DEEPEST = 20  # where a CMC ends
BLOCK = 128  # probes ranked at once: about 0.1 GB of temporaries in a gallery of MARS's size
_PAIRS = 64  # ties resolved at once, each against the whole gallery


@dataclass(frozen=True)
class Ranking:
    """How well features find people, and by which protocol.

    protocol: the name of the rules.
    cmc: for k from 1 to DEEPEST, the share of probes with one of their person among the k nearest.
    mean_ap: mean over probes of the average precision.
    chance: the rank-1 that a random order of the gallery would give.
    probes: how many there are.
    valid: how many of them have a match that counts.
    gallery: how many tracklets it holds, junk included.
    junk: how many of these are passed over, on average over the probes.
    ties: how equal distances were counted.
    reranked: by which version the distances were re-ranked; None if they were not.
    """

    protocol: str
    cmc: dict[int, float]
    mean_ap: float
    chance: float
    probes: int
    valid: int
    gallery: int
    junk: float
    ties: Ties
    reranked: Rerank | None


def cosine_distances(probe: Floats, gallery: Floats, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """1 - cosine of each pair, in float64, block by block of probes; equal gallery rows are equally far.

    Equal to the last bit, that is: a row and three times that row differ by a rounding.

    Args:
        probe, gallery: features (Q, D) and (G, D).
        device: where to compute.

    Yields:
        (q, G) float64 on the device: the next q <= BLOCK probes' distances.
    """
    probe_unit, gallery_unit = (normalize(torch.from_numpy(of).to(device), dim=1) for of in (probe, gallery))
    # A matrix product rounds equal columns differently, by where they stand: each distinct row goes in once.
    distinct, places = torch.unique(gallery_unit, dim=0, return_inverse=True)
    for block in torch.split(probe_unit, BLOCK):
        yield (1 - block @ distinct.T)[:, places]


def positive_ranks(distance: Tensor, positive: Tensor, counts: Tensor, ties: Ties) -> list[Ints]:
    """Ranks from 1, ascending, of each probe's positives: 1 + how many gallery items that count come before.

    Only the positives are sorted; the gallery is not.

    Args:
        distance: (q, G) float64, finite.
        positive: (q, G) bool, which items show the probe's person and count.
        counts: (q, G) bool, which items are not junk.
        ties: who of two equally far comes first.

    Returns:
        One array a probe, as long as it has positives.
    """
    device, (probes, items) = distance.device, distance.shape
    probe, place = positive.nonzero(as_tuple=True)  # by probe, then by place in the gallery
    matches = probe.bincount(minlength=probes)
    slot = torch.arange(len(probe), device=device) - (matches.cumsum(0) - matches)[probe]
    # Rows are as long as the longest: a missing positive is infinitely far, and so is whoever cannot come before one.
    own = distance.new_full((probes, max(1, int(matches.max()))), torch.inf)  # (q, P)
    own[probe, slot] = distance[probe, place]
    places = torch.zeros_like(own, dtype=torch.int64)
    places[probe, slot] = place
    own, order = own.sort(dim=1, stable=True)
    others = torch.where(counts & ~positive, distance, torch.inf)

    first = torch.searchsorted(own, others, right=ties != "pessimistic")  # the first positive that each comes before
    before = _count_before(first, own.shape[1])
    if ties == "stable":
        # Few probes have somebody else as near as a positive: only those are counted again, and only they are compared.
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
    """(q, P) how many come before each positive, of the first that each comes before (q, G): 0 to P, P for none."""
    probes = len(first)
    first = first + (positives + 1) * torch.arange(probes, device=first.device)[:, None]
    counted = first.flatten().bincount(minlength=probes * (positives + 1)).view(probes, positives + 1)
    return counted.cumsum(1)[:, :positives]


def average_precision(ranks: Ints) -> float:
    """The mean, over the positives, of the precision among all that are at least as near. Ranks ascend from 1."""
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def trapezoid_average_precision(ranks: Ints) -> float:
    """The area under precision over recall by trapezoids, as MARS's `compute_AP`. Ranks ascend from 1.

    Recall grows at hits only, by 1/n each. A hit's trapezoid has the precision at the hit on one side, on the other the
    precision one place above, which is 1 above the first place.
    """
    hits = np.arange(1, len(ranks) + 1)
    above = np.where(ranks == 1, 1.0, (hits - 1) / np.maximum(ranks - 1, 1))
    return float(((above + hits / ranks) / 2).mean())
