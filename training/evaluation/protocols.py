"""Protocols: which gallery items count for a query, and how CMC and mAP follow from their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from training.evaluation.ranking import (
    DEEPEST,
    Ints,
    Ranking,
    Rerank,
    Ties,
    average_precision,
    positive_ranks,
    trapezoid_average_precision,
)
from training.runtime.errors import UserError

JUNK = -1  # MARS's number for tracklets that show nobody in particular


@dataclass(frozen=True)
class Protocol:
    """Rules of an evaluation.

    same_camera: a query's person by the query's own camera is junk, as person -1 is, or must not be in the gallery.
    queries_in_gallery: whether a query stays in the gallery for other queries; otherwise all queries are removed.
    average_precision: from the ranks of one query's positives.
    unmatched: a query without a match is an error, counts as 0 in every mean, or is left out of the means.
    """

    same_camera: Literal["junk", "refused"]
    queries_in_gallery: bool
    average_precision: Callable[[Ints], float]
    unmatched: Literal["refused", "zero", "left out"]


ProtocolName: TypeAlias = Literal["single-shot", "mars-official", "mars-standard-ap", "torchreid"]
PROTOCOLS: dict[str, Protocol] = {
    "single-shot": Protocol("refused", True, average_precision, "refused"),
    "mars-official": Protocol("junk", True, trapezoid_average_precision, "zero"),
    "mars-standard-ap": Protocol("junk", True, average_precision, "left out"),
    "torchreid": Protocol("junk", False, average_precision, "left out"),
}


@dataclass(frozen=True)
class QueryGallery:
    """Query and gallery labels.

    query_people, query_cameras: (Q,) int64.
    gallery_people, gallery_cameras: (G,) int64.
    rows_in_gallery: (Q,) int64, the row of the gallery that is the query itself, -1 if none is.
    """

    query_people: Ints
    query_cameras: Ints
    gallery_people: Ints
    gallery_cameras: Ints
    rows_in_gallery: Ints


@dataclass(frozen=True)
class ProtocolMasks:
    """Gallery items that a protocol counts for each query.

    name, protocol: the rules.
    gallery_rows: (G',) int64, the rows of the whole gallery that make the protocol's.
    positive: (Q, G') bool, items that show the query's person and are not junk.
    not_junk: (Q, G') bool.
    """

    name: str
    protocol: Protocol
    gallery_rows: Ints
    positive: Tensor
    not_junk: Tensor


def prepare(name: str, labels: QueryGallery) -> ProtocolMasks:
    """Apply a protocol to the labels; no feature is needed.

    Raises:
        UserError: there is no such protocol, or it does not fit: no query has a match, or under single-shot a query's
            person is missing from the gallery, or in it by the query's own camera.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol: got {name!r}, wanted one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    gallery_rows = np.arange(len(labels.gallery_people))
    if not protocol.queries_in_gallery:
        gallery_rows = np.setdiff1d(gallery_rows, labels.rows_in_gallery)
    people, cameras = (torch.from_numpy(of[gallery_rows]) for of in (labels.gallery_people, labels.gallery_cameras))
    person, camera = (torch.from_numpy(of)[:, None] for of in (labels.query_people, labels.query_cameras))
    same_person = person == people
    same_view = same_person & (camera == cameras)
    if protocol.same_camera == "refused":
        if same_view.any():
            query = int(same_view.any(1).nonzero()[0])
            seen = f"person {labels.query_people[query]} by camera {labels.query_cameras[query]}, as the query"
            raise UserError(f"protocol {name}: got a gallery with {seen}, wanted other cameras; try mars-official")
        not_junk = torch.ones_like(same_person)
    else:
        not_junk = ~same_view & (people != JUNK)
    positive = same_person & not_junk
    unmatched = (~positive.any(1)).nonzero().ravel().tolist()
    if unmatched and protocol.unmatched == "refused":
        absent = labels.query_people[unmatched].min()
        raise UserError(
            f"protocol {name}: got no tracklet of person {absent} in the gallery, wanted one of each query's person"
        )
    if len(unmatched) == len(positive):
        none = "none with a match in the gallery by another camera"
        raise UserError(f"protocol {name}: got {len(unmatched)} queries, {none}")
    return ProtocolMasks(name, protocol, gallery_rows, positive, not_junk)


def rank(
    masks: ProtocolMasks,
    distances: Iterable[Tensor],
    ties: Ties = "stable",
    *,
    reranked: Rerank | None = None,
    advance: Callable[[float], None] = lambda done: None,
) -> Ranking:
    """Compute CMC and mAP under a protocol.

    Args:
        masks: of Q queries in a gallery of G'.
        distances: (q, G') float64 blocks on one device, of all Q queries in order.
        ties: how equal distances are counted.
        reranked: version by which the distances were re-ranked, None if they were not; noted in the result.
        advance: called with the number of queries just ranked.
    """
    first, precision = [], []
    start = 0
    for block in distances:
        rows = slice(start, start + len(block))
        start = rows.stop
        positive, not_junk = (mask[rows].to(block.device) for mask in (masks.positive, masks.not_junk))
        for ranks in positive_ranks(block, positive, not_junk, ties):
            first.append(ranks[0] if len(ranks) else np.inf)
            precision.append(masks.protocol.average_precision(ranks) if len(ranks) else 0.0)
        advance(len(block))
    matched = np.isfinite(first)
    taken = np.full_like(matched, True) if masks.protocol.unmatched == "zero" else matched
    share = masks.positive.count_nonzero(1).double() / masks.not_junk.count_nonzero(1).clamp(min=1)
    return Ranking(
        protocol=masks.name,
        cmc={k: float((np.array(first)[taken] <= k).mean()) for k in range(1, DEEPEST + 1)},
        mean_ap=float(np.array(precision)[taken].mean()),
        chance=float(share.numpy()[taken].mean()),
        queries=len(first),
        valid=int(matched.sum()),
        gallery=len(masks.gallery_rows),
        junk=float((~masks.not_junk).count_nonzero(1).double().mean()),
        ties=ties,
        reranked=reranked,
    )
