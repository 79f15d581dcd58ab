"""k-reciprocal re-ranking: Zhong, Zheng, Cao, Li, CVPR 2017 (arXiv 1701.08398)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from training.evaluation.ranking import BLOCK, Floats, Ints, cosine_distances


def reranked_distances(
    features: Floats,
    probes: Ints,
    gallery: Ints,
    device: torch.device | str = "cpu",
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> Iterator[Tensor]:
    """Distances by whom two tracklets have for neighbours, mixed with those of their features.

    N(i, k) are i and its k nearest others, d(i, j) is the cosine distance over i's largest. Then, in the paper's terms,
    R(i, k) = {j in N(i, k): i in N(j, k)}; R*(i) = R(i, k1) and all R(q, k1/2) of q in R(i, k1) of which at least 2/3
    lie in R(i, k1); V(i, j) = exp(-d(i, j)) for j in R*(i), else 0; each V(i) becomes the mean over N(i, k2 - 1);
    d_J(i, j) = 1 - sum min(V(i), V(j)) / sum max(V(i), V(j)); and the result is (1 - weight) d_J + weight d. That a
    tracklet is its own neighbour, and how d is scaled, is as in the paper's published code, which departs from the
    equations in two points that are not followed: it scales each V(i) to sum 1, and asks for more than 2/3.
    Of equally far neighbours the earlier row comes first. V is sparse, and N x N distances pass by in blocks of rows:
    time grows with N^2, memory with N.

    Args:
        features: (N, D) of probes and gallery together, a tracklet that is both only once.
        probes, gallery: (Q,) and (G,), their rows.
        device: where distances are computed.
        k1, k2: sizes of neighbourhoods.
        weight: of the original distance, lambda in the paper.

    Yields:
        (q, G) float64 on the device: the next q <= BLOCK probes' distances.
    """
    nearest, largest = _nearest(features, min(k1 + 1, len(features)), device)
    mutual, close = _reciprocal(nearest), _reciprocal(nearest[:, : round(k1 / 2) + 1])
    inside = (mutual @ close.T).multiply(mutual).tocoo()  # |R(i, k1) & R(q, k1/2)| for q in R(i, k1)
    enough = 3 * inside.data >= 2 * close.sum(1)[inside.col]
    joining = sparse.csr_array((enough[enough], (inside.row[enough], inside.col[enough])), shape=mutual.shape)
    expanded = (mutual + joining.astype(np.int64) @ close).tocsr()

    blocks = zip(_blocks(len(features)), cosine_distances(features, features, device), strict=True)
    encoded = sparse.vstack([_encode(block, expanded[rows], largest[rows]) for rows, block in blocks]).tocsr()
    neighbours = nearest[:, :k2]
    encoded = (_indicator(neighbours) @ encoded) / neighbours.shape[1]

    by_column, total = encoded[gallery].tocsc(), encoded.sum(1)
    distances = cosine_distances(features[probes], features[gallery], device)
    for part, block in zip(_blocks(len(probes)), distances, strict=True):
        rows = probes[part]
        shared = np.stack([_shared(encoded[[row]], by_column) for row in rows])
        jaccard = 1 - shared / (total[rows][:, None] + total[gallery] - shared)
        scaled = block / torch.from_numpy(largest[rows]).to(device)[:, None]
        yield (1 - weight) * torch.from_numpy(jaccard).to(device) + weight * scaled


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _nearest(features: Floats, count: int, device: torch.device | str) -> tuple[Ints, Floats]:
    """(N, count) rows of each one's nearest, itself the first, of equals the earlier; and (N,) largest distances."""
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
        largest.append(block.amax(1).clamp(min=1e-12).cpu().numpy())  # all may be in one place
    return np.concatenate(nearest), np.concatenate(largest)


def _indicator(rows: Ints) -> sparse.csr_array:
    """(N, N) with 1 where the second is among the first's (N, k) rows."""
    size, count = rows.shape
    ones = np.ones(rows.size, dtype=np.int64)
    return sparse.csr_array((ones, rows.ravel(), np.arange(0, rows.size + 1, count)), shape=(size, size))


def _reciprocal(nearest: Ints) -> sparse.csr_array:
    forward = _indicator(nearest)
    both: sparse.csr_array = forward.multiply(forward.T).tocsr()
    return both


def _encode(distance: Tensor, members: sparse.csr_array, largest: Floats) -> sparse.csr_array:
    """V of a block of tracklets: exp(-d) at the members of each one's R*, whose pattern is `members` (q, N)."""
    row = np.repeat(np.arange(len(largest)), np.diff(members.indptr))
    near = distance[torch.from_numpy(row), torch.from_numpy(members.indices).long()].cpu().numpy()
    return sparse.csr_array((np.exp(-near / largest[row]), members.indices, members.indptr), shape=members.shape)


def _shared(encoded: sparse.csr_array, by_column: sparse.csc_array) -> Floats:
    """Sum of the minima of one V (1, N) and each of the gallery's (G, N)."""
    columns = by_column[:, encoded.indices]
    columns.data = np.minimum(columns.data, np.repeat(encoded.data, np.diff(columns.indptr)))
    total: Floats = columns.sum(1)
    return total
