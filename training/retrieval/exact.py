"""Exact k-nearest-neighbor search by cosine, in memory that does not grow with the gallery."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.evaluation.ranking import BLOCK, Floats, Ints
from training.retrieval.feature_file import FeatureFile
from training.runtime.terminal import track

_NUMBERS = 2**21  # elements of features per chunk: more is slower, as they leave the cache


def nearest(queries: Tensor, gallery: FeatureFile, count: int, device: torch.device) -> tuple[Floats, Ints]:
    """Find the rows of a gallery that are nearest to each query; of equally near ones the first.

    A matrix product in float32 selects all candidates within its rounding error. Their similarities are then computed
    in float64, in the same way for every row, so that equal rows are equally near.

    Args:
        queries: (Q, D) float32, none of them zero.
        gallery: N features of D elements.
        count: k, at most N.
        device: where the matrix product is computed.

    Returns:
        Cosine similarities, descending, and rows, both (Q, k).

    Raises:
        UserError: a feature of the gallery is zero or not finite.
    """
    numbers = queries.double().numpy()
    best, rows = np.full((len(queries), count), -np.inf), np.zeros((len(queries), count), dtype=np.int64)
    units = unit(queries.to(device))
    # Bound on the error of a product of unit vectors, the rounding of its factors included.
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
    """Divide each of N features (N, D) float32 by its length."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float64)
    return (features / length).float()


def _cosines(features: Tensor, query: Floats) -> Floats:
    """Return the cosines (n,) of features (n, D) float32 and a query (D,); NumPy sums each row on its own."""
    numbers = features.double().numpy()
    lengths = np.sqrt((numbers * numbers).sum(1) * (query * query).sum())
    cosines: Floats = (numbers * query).sum(1) / lengths
    return cosines
