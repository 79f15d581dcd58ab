"""The exact k nearest by cosine in a gallery of any size, in constant memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.evaluation.ranking import BLOCK, Floats, Ints
from training.retrieval.feature_file import FeatureFile
from training.runtime.terminal import track

_NUMBERS = 2**21  # of features held at once: more is slower, for want of cache


def nearest(queries: Tensor, gallery: FeatureFile, count: int, device: torch.device) -> tuple[Floats, Ints]:
    """The rows of a gallery that are nearest to each query, of equally near ones the first.

    A matrix product in float32 tells who may be among the nearest, within its rounding; their similarities are then
    computed in float64, the same way wherever a row stands, so that equal rows are equally near.

    Args:
        queries: (Q, D) float32, none of them zero.
        gallery: of N features of D numbers.
        count: k, at most N.
        device: where to multiply.

    Returns:
        Cosine similarities, descending, and rows, both (Q, k).

    Raises:
        UserError: a feature of the gallery is zero or not finite.
    """
    numbers = queries.double().numpy()
    best, rows = np.full((len(queries), count), -np.inf), np.zeros((len(queries), count), dtype=np.int64)
    units = unit(queries.to(device))
    # How far the products of unit vectors may be off, on either side, with each factor's own rounding.
    rounding = 2 * (gallery.width + 8) * 2.0**-24
    chunks = gallery.chunks(max(1, _NUMBERS // gallery.width))
    for start, part in track(chunks, "Searching the gallery", gallery.rows, "features", size=lambda c: len(c[1])):
        columns = unit(part.to(device)).T
        for block in range(0, len(queries), BLOCK):
            similarity = units[block : block + BLOCK] @ columns  # (q, n)
            least = similarity.topk(min(count, len(part))).values[:, -1]
            so_far = torch.from_numpy(best[block : block + BLOCK, -1]).to(similarity)
            near = (similarity >= (torch.maximum(least, so_far) - rounding)[:, None]).cpu().numpy()
            for place in np.flatnonzero(near.any(1)):
                query, members = block + place, np.flatnonzero(near[place])
                values = np.concatenate((best[query], _cosines(part[members], numbers[query])))
                found = np.concatenate((rows[query], start + members))
                order = np.argsort(-values, kind="stable")[:count]
                best[query], rows[query] = values[order], found[order]
    return best, rows


def unit(features: Tensor) -> Tensor:
    """Features (N, D) float32, each divided by its length."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float64)
    return (features / length).float()


def _cosines(features: Tensor, query: Floats) -> Floats:
    """(n,) cosines of features (n, D) float32 and a query (D,): NumPy sums each row by itself, whatever the others."""
    numbers = features.double().numpy()
    lengths = np.sqrt((numbers * numbers).sum(1) * (query * query).sum())
    cosines: Floats = (numbers * query).sum(1) / lengths
    return cosines
