"""k-reciprocal re-ranking: Zhong, Zheng, Cao, Li, CVPR 2017 (arXiv 1701.08398)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from training.evaluation.ranking import BLOCK, Floats, Ints, Rerank, cosine_distances


def reranked_distances(
    features: Floats,
    queries: Ints,
    gallery: Ints,
    device: torch.device | str = "cpu",
    *,
    by: Rerank = "equations",
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    advance: Callable[[float], None] = lambda done: None,
) -> Iterator[Tensor]:
    """Yield each query's cosine distances mixed with Jaccard distances between sets of k-reciprocal neighbors.

    N(i, k) are i and its k nearest others; d(i, j) is the cosine distance divided by the largest in row i. Then, in the
    paper's terms:

        R(i, k) = {j in N(i, k): i in N(j, k)}
        R*(i) = R(i, k1), joined with R(q, k1/2) for each q in R(i, k1) with
            |R(i, k1) & R(q, k1/2)| >= 2/3 |R(q, k1/2)|
        V(i, j) = exp(-d(i, j)) for j in R*(i), else 0; after which each V(i) becomes the mean over N(i, k2 - 1)
        d_J(i, j) = 1 - sum min(V(i), V(j)) / sum max(V(i), V(j))
        result = (1 - weight) d_J + weight d

    These are the "equations". The "published" version is the authors' code (github.com/zhunzhong07/person-re-ranking),
    which most published results use. It differs in three points: R(q, k1/2) joins only if more than 2/3 of it is in
    R(i, k1); each V(i) is divided by its sum before means are taken; and the nodes are all queries followed by the
    whole gallery, so a tracklet in both, as in MARS, becomes two nodes that are neighbors of each other. Where the
    equations are ambiguous, both versions follow that code: i is in N(i, k), d is scaled by row, and k1/2 is rounded
    half to even, as in its Python files (its MATLAB file rounds differently, with the same result for even k1).

    Published distances, based on the squared Euclidean distance between unit features, equal those of that code except:
        ties: here i itself is its nearest, and of equally near others the earlier row comes first; there the order is
            that of argsort, unspecified.
        rounding: float64 here, float32 there, which may order near ties differently.

    V is sparse, and N x N distances are computed in blocks of rows: time grows with N^2, memory with N.

    Args:
        features: (N, D) of queries and gallery together, with a tracklet that is in both only once.
        queries, gallery: (Q,) and (G,), their rows.
        device: where distances are computed.
        by: the version.
        k1, k2: sizes of neighborhoods.
        weight: of the original distance, lambda in the paper.
        advance: called with the number of rows just done; `rows_to_rerank` is their total.

    Yields:
        (q, G) float64 on the device: the next q <= BLOCK queries' distances.
    """
    if by == "published":
        features = features[np.concatenate((queries, gallery))]
        queries, gallery = np.arange(len(queries)), len(queries) + np.arange(len(gallery))
    nearest, largest = _nearest(features, min(k1 + 1, len(features)), device, advance)
    mutual, close = _reciprocal(nearest), _reciprocal(nearest[:, : round(k1 / 2) + 1])
    inside = (mutual @ close.T).multiply(mutual).tocoo()  # |R(i, k1) & R(q, k1/2)| for q in R(i, k1)
    above = 3 * inside.data - 2 * close.sum(1)[inside.col]  # in integers: 2/3 exactly is a common case
    enough = above > 0 if by == "published" else above >= 0
    joining = sparse.csr_array((enough[enough], (inside.row[enough], inside.col[enough])), shape=mutual.shape)
    expanded = (mutual + joining.astype(np.int64) @ close).tocsr()

    parts = []
    for part, block in zip(_blocks(len(features)), cosine_distances(features, features, device), strict=True):
        parts.append(_encode(block, expanded[part], largest[part]))
        advance(len(block))
    encoded = sparse.vstack(parts).tocsr()
    if by == "published":
        encoded = encoded.multiply(1 / encoded.sum(1)[:, None]).tocsr()
    neighbors = nearest[:, :k2]
    encoded = (_indicator(neighbors) @ encoded) / neighbors.shape[1]

    by_column, total = encoded[gallery].tocsc(), encoded.sum(1)
    distances = cosine_distances(features[queries], features[gallery], device)
    for part, block in zip(_blocks(len(queries)), distances, strict=True):
        rows = queries[part]
        shared = np.stack([_shared(encoded[[row]], by_column) for row in rows])
        jaccard = 1 - shared / (total[rows][:, None] + total[gallery] - shared)
        scaled = block / torch.from_numpy(largest[rows]).to(device)[:, None]
        yield (1 - weight) * torch.from_numpy(jaccard).to(device) + weight * scaled
        advance(len(block))


def rows_to_rerank(features: Floats, queries: Ints, gallery: Ints, by: Rerank) -> int:
    """Number of rows `reranked_distances` processes: N to find neighbors, N to encode and Q to mix distances."""
    nodes = len(queries) + len(gallery) if by == "published" else len(features)
    return 2 * nodes + len(queries)


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _nearest(
    features: Floats, count: int, device: torch.device | str, advance: Callable[[float], None]
) -> tuple[Ints, Floats]:
    """Return the rows (N, count) of each node's nearest, itself first, ties by row, and the largest distances (N,)."""
    nearest, largest = [], []
    start = 0
    for block in cosine_distances(features, features, device):
        own = torch.arange(len(block), device=block.device)
        block[own, start + own] = -torch.inf
        start += len(block)
        last = block.topk(count, largest=False).values[:, -1:]
        nearer, tied = block < last, block == last
        taken = nearer | (tied & (tied.cumsum(1) <= count - nearer.sum(1, keepdim=True)))
        rows = taken.nonzero()[:, 1].view(-1, count)
        order = block.gather(1, rows).argsort(dim=1, stable=True)
        nearest.append(rows.gather(1, order).cpu().numpy())
        largest.append(block.amax(1).clamp(min=1e-12).cpu().numpy())  # all features may be equal
        advance(len(block))
    return np.concatenate(nearest), np.concatenate(largest)


def _indicator(rows: Ints) -> sparse.csr_array:
    """Return (N, N), with 1 at (i, j) where j is in row i of `rows` (N, k)."""
    size, count = rows.shape
    ones = np.ones(rows.size, dtype=np.int64)
    return sparse.csr_array((ones, rows.ravel(), np.arange(0, rows.size + 1, count)), shape=(size, size))


def _reciprocal(nearest: Ints) -> sparse.csr_array:
    forward = _indicator(nearest)
    both: sparse.csr_array = forward.multiply(forward.T).tocsr()
    return both


def _encode(distance: Tensor, members: sparse.csr_array, largest: Floats) -> sparse.csr_array:
    """Return V of a block of nodes: exp(-d) at the members of each node's R*, the pattern of `members` (q, N)."""
    row = np.repeat(np.arange(len(largest)), np.diff(members.indptr))
    near = distance[torch.from_numpy(row), torch.from_numpy(members.indices).long()].cpu().numpy()
    return sparse.csr_array((np.exp(-near / largest[row]), members.indices, members.indptr), shape=members.shape)


def _shared(encoded: sparse.csr_array, by_column: sparse.csc_array) -> Floats:
    """Return (G,), the sums of the elementwise minima of one V (1, N) and each of the gallery's (G, N)."""
    columns = by_column[:, encoded.indices]
    columns.data = np.minimum(columns.data, np.repeat(encoded.data, np.diff(columns.indptr)))
    total: Floats = columns.sum(1)
    return total
