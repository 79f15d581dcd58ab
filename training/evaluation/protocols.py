"""The protocols: which gallery items count for a probe, and how CMC and mAP come of their order."""

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
    """The rules of an evaluation.

    same_camera: whether a probe's person by the probe's own camera is junk, as person -1 is; else there may be none.
    probes_in_gallery: whether a probe stays in the gallery for other probes; else all of them are taken out.
    average_precision: of the ranks of one probe's positives.
    unmatched: what becomes of a probe without a match: an error, 0 in every mean, or left out of the means.
    """

    same_camera: Literal["junk", "refused"]
    probes_in_gallery: bool
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
class Search:
    """Who is looked for, and among whom.

    probe_people, probe_cameras: (Q,) int64.
    gallery_people, gallery_cameras: (G,) int64.
    places: (Q,) int64, where in the gallery each probe itself is, -1 if nowhere.
    """

    probe_people: Ints
    probe_cameras: Ints
    gallery_people: Ints
    gallery_cameras: Ints
    places: Ints


@dataclass(frozen=True)
class Trial:
    """A search under a protocol.

    name, protocol: the rules.
    kept: (G',) int64, which of the search's gallery are in the protocol's.
    positive: (Q, G') bool, which of those count and show the probe's person.
    counts: (Q, G') bool, which of those are not junk.
    """

    name: str
    protocol: Protocol
    kept: Ints
    positive: Tensor
    counts: Tensor


def prepare(name: str, search: Search) -> Trial:
    """Lay a search out as a protocol has it; no feature is needed.

    Raises:
        UserError: there is no such protocol, or it does not fit: nobody has a match, or under single-shot a probe's
            person is missing from the gallery, or in it by the probe's own camera.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol: got {name!r}, wanted one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    kept = np.arange(len(search.gallery_people))
    if not protocol.probes_in_gallery:
        kept = np.setdiff1d(kept, search.places)
    people, cameras = (torch.from_numpy(of[kept]) for of in (search.gallery_people, search.gallery_cameras))
    person, camera = (torch.from_numpy(of)[:, None] for of in (search.probe_people, search.probe_cameras))
    same_person = person == people
    same_view = same_person & (camera == cameras)
    if protocol.same_camera == "refused":
        if same_view.any():
            probe = int(same_view.any(1).nonzero()[0])
            seen = f"person {search.probe_people[probe]} by camera {search.probe_cameras[probe]}, as the probe"
            raise UserError(f"protocol {name}: got a gallery with {seen}, wanted other cameras; try mars-official")
        counts = torch.ones_like(same_person)
    else:
        counts = ~same_view & (people != JUNK)
    positive = same_person & counts
    lost = (~positive.any(1)).nonzero().ravel().tolist()
    if lost and protocol.unmatched == "refused":
        absent = search.probe_people[lost].min()
        raise UserError(
            f"protocol {name}: got no tracklet of person {absent} in the gallery, wanted one of each probe's person"
        )
    if len(lost) == len(positive):
        raise UserError(f"protocol {name}: got {len(lost)} probes, none with a match in the gallery by another camera")
    return Trial(name, protocol, kept, positive, counts)


def rank(
    trial: Trial,
    distances: Iterable[Tensor],
    ties: Ties = "stable",
    *,
    reranked: Rerank | None = None,
    advance: Callable[[float], None] = lambda done: None,
) -> Ranking:
    """CMC and mAP of a trial.

    Args:
        trial: of Q probes in a gallery of G'.
        distances: (q, G') float64 each, on one device, together the Q probes' in order.
        ties: how equal distances are counted.
        reranked: by which version the distances are re-ranked, None if they are not; noted in the result.
        advance: called with the number of probes just ranked.
    """
    first, precision = [], []
    start = 0
    for block in distances:
        rows = slice(start, start + len(block))
        start = rows.stop
        positive, counts = (mask[rows].to(block.device) for mask in (trial.positive, trial.counts))
        for ranks in positive_ranks(block, positive, counts, ties):
            first.append(ranks[0] if len(ranks) else np.inf)
            precision.append(trial.protocol.average_precision(ranks) if len(ranks) else 0.0)
        advance(len(block))
    matched = np.isfinite(first)
    taken = np.full_like(matched, True) if trial.protocol.unmatched == "zero" else matched
    share = trial.positive.count_nonzero(1).double() / trial.counts.count_nonzero(1).clamp(min=1)
    return Ranking(
        protocol=trial.name,
        cmc={k: float((np.array(first)[taken] <= k).mean()) for k in range(1, DEEPEST + 1)},
        mean_ap=float(np.array(precision)[taken].mean()),
        chance=float(share.numpy()[taken].mean()),
        probes=len(first),
        valid=int(matched.sum()),
        gallery=len(trial.kept),
        junk=float((~trial.counts).count_nonzero(1).double().mean()),
        ties=ties,
        reranked=reranked,
    )
