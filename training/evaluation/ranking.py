"""CMC and mAP: how high in the gallery a probe finds its own person, by a named protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOP = (1, 5, 10, 20)


@dataclass(frozen=True)
class Ranking:
    """How well features find people, and by which protocol.

    protocol: the name of the rules.
    cmc: for k in TOP, the share of probes with one of their person among the k nearest.
    mean_ap: mean over probes of the average precision.
    chance: the rank-1 that a random order of the gallery would give.
    probes, gallery: how many of each.
    """

    protocol: str
    cmc: dict[int, float]
    mean_ap: float
    chance: float
    probes: int
    gallery: int


def cosine_distance(probe: Floats, gallery: Floats) -> Floats:
    """1 - cosine of each pair: (Q, D) and (G, D) to (Q, G), in float64; equal gallery rows are equally far."""
    probe, gallery = (f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12) for f in (probe, gallery))
    # A matrix product rounds equal columns differently, by where they stand: each distinct row goes in once.
    distinct, places = np.unique(gallery, axis=0, return_inverse=True)
    distance: Floats = 1 - probe @ distinct.T
    return distance[:, places.ravel()]


def positive_ranks(distance: Floats, positive: NDArray[np.bool_]) -> Ints:
    """Ranks from 1, ascending, of the positives of one probe in its gallery; of equals, the earlier comes first.

    Args:
        distance: (G,), of the probe to each gallery item that counts.
        positive: (G,), which of them show the probe's person.
    """
    places = np.flatnonzero(positive)[:, None]
    own = distance[places]
    before = (distance < own) | ((distance == own) & (np.arange(len(distance)) < places))
    return np.sort(1 + before.sum(1))


def average_precision(ranks: Ints) -> float:
    """The mean, over the positives, of the precision among all that are at least as near. Ranks ascend from 1."""
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def single_shot(probe: Floats, probe_people: Ints, gallery: Floats, gallery_people: Ints) -> Ranking:
    """The protocol of iLIDS-VID and PRID: the whole gallery counts, and shows every probe's person at least once.

    Args:
        probe, gallery: features (Q, D) and (G, D).
        probe_people, gallery_people: (Q,) and (G,), whom they show.

    Raises:
        UserError: a probe's person is not in the gallery.
    """
    absent = sorted(set(probe_people.tolist()) - set(gallery_people.tolist()))
    if absent:
        raise UserError(f"gallery: got no tracklet of person {absent[0]}, wanted one of each probe's person")
    positive = probe_people[:, None] == gallery_people
    ranks = [positive_ranks(d, p) for d, p in zip(cosine_distance(probe, gallery), positive, strict=True)]
    best = np.array([r[0] for r in ranks])
    return Ranking(
        protocol="single-shot",
        cmc={k: float((best <= k).mean()) for k in TOP},
        mean_ap=float(np.mean([average_precision(r) for r in ranks])),
        chance=float(positive.mean()),
        probes=len(probe),
        gallery=len(gallery),
    )


Protocol = Callable[[Floats, Ints, Floats, Ints], Ranking]
PROTOCOLS: dict[str, Protocol] = {"single-shot": single_shot}
