"""Collectives: gather a batch from all ranks, share batch statistics, check that shapes and dtypes of ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

# Raised while torch.compile traces: it then breaks the graph, or with fullgraph=True shows this message.
GRAPH_BREAK_ERROR = "process_group: got one inside torch.compile, wanted fullgraph=False: collectives cannot be traced"


def count_features(
    features: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
) -> tuple[list[int], list[int]]:
    """Count every rank's features (..., N, D) and those of its gallery, the features without one. One collective.

    Raises:
        ValueError: on every rank, if numbers of groups or columns or dtypes differ between ranks, no rank has a
            feature, or some have a gallery and others none.
    """
    own = _describe(features, labels)
    table = iter(_gather(own + _describe(gallery, gallery_labels), features.device, None))
    counts = _check_described("features", "labels", *islice(table, len(own)))
    gallery_counts = _check_described("gallery", "gallery_labels", *table)
    return counts, gallery_counts or counts


def _describe(features: Tensor | None, labels: Tensor | None) -> list[int]:
    """Return what ranks compare of features (..., N, D), all zeros if there are none."""
    if features is None or labels is None:
        return [0] * 6
    *groups, n, d = features.shape
    return [n, d, features.dim(), *(groups or [1]), *(_encode_dtype(tensor.dtype) for tensor in (features, labels))]


def _check_described(
    name: str,
    labels_name: str,
    counts: list[int],
    columns: list[int],
    dimensions: list[int],
    groups: list[int],
    dtypes: list[int],
    label_dtypes: list[int],
) -> list[int]:
    """Return the counts of every rank, none if there are no such features; raise unless the rest is the same."""
    if not any(dimensions):
        return []
    if not all(dimensions):
        raise ValueError(f"{name}: got one on some of the ranks, wanted one on every rank or on none")
    _check_same(name, "columns", columns)
    _check_same(name, "dimensions", dimensions)
    _check_same(name, "groups", groups)
    for kind, numbers in ((name, dtypes), (labels_name, label_dtypes)):
        _check_same(kind, "dtypes", [_decode_dtype(number) for number in numbers])
    if not any(counts):
        raise ValueError(f"{name}: got none on any rank, wanted at least 1 on one of them")
    return counts


def gather_rows(rows: Tensor, counts: list[int], dim: int) -> Tensor:
    """Concatenate rows along a dimension, given from the end, of all ranks in rank order, with gradients.

    counts: rows of every rank.
    """
    missing = max(counts) - rows.shape[dim]
    padded = F.pad(rows, (0, 0) * (-dim - 1) + (0, missing)).contiguous()
    parts = torch.distributed.nn.functional.all_gather(padded)  # type: ignore[no-untyped-call]
    for part in parts:
        if part.requires_grad:  # the backward's collective assumes a contiguous gradient
            part.register_hook(Tensor.contiguous)
    return torch.cat([part.narrow(dim, 0, count) for part, count in zip(parts, counts, strict=True)], dim)


def world_size() -> int:
    """Return the number of ranks of torch.distributed, 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def has_other_ranks() -> bool:
    """Return True if torch.distributed has other ranks to gather a batch from."""
    return world_size() > 1


def spans_ranks(process_group: ProcessGroup | None) -> bool:
    """Return True if the group has other ranks to share statistics with."""
    return process_group is not None and process_group.size() > 1


def count_values(x: Tensor, hidden: int, process_group: ProcessGroup) -> list[int]:
    """Count the values per gate channel and frame on every rank, B H W. One collective.

    Args:
        x: feature maps (B, T, C, H, W).
        hidden: D, the gate channels.
        process_group: of several ranks.

    Raises:
        ValueError: on every rank, if numbers of frames or gate channels or dtypes differ between ranks.
    """
    clips, frames, _, height, width = x.shape
    own = [clips * height * width, frames, hidden, _encode_dtype(x.dtype)]
    elements_per_rank, all_frames, channels, numbers = _gather(own, x.device, process_group)
    where = " of process_group"
    _check_same("x", "frames", all_frames, where)
    _check_same("w", "gate channels", channels, where)
    _check_same("x", "dtypes", [_decode_dtype(number) for number in numbers], where)
    return elements_per_rank


def _gather(own: list[int], device: torch.device, process_group: ProcessGroup | None) -> list[list[int]]:
    """Gather a few integers from every rank: one list over the ranks per integer."""
    row = torch.tensor(own, device=device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(rows, row, group=process_group)
    table: list[list[int]] = torch.stack(rows).t().tolist()
    return table


def _check_same(name: str, what: str, values: Sequence[int | str], where: str = "") -> None:
    if len(set(values)) > 1:
        got = ", ".join(map(str, values))
        wanted = "one" if what == "dtypes" else "as many"
        raise ValueError(f"{name}: got [{got}] {what} on the ranks{where}, wanted {wanted} on every rank")


def _encode_dtype(dtype: torch.dtype) -> int:
    """Encode a dtype's name as a 63-bit integer, which ranks can exchange."""
    return int.from_bytes(str(dtype).removeprefix("torch.")[:8].encode(), "big")


def _decode_dtype(number: int) -> str:
    return number.to_bytes(8, "big").lstrip(b"\0").decode()


class Ranks:
    """Ranks of a process group that share batch statistics.

    Args:
        process_group: its name in torch.distributed.
        elements_per_rank: number of values per gate channel on each rank.
        device: of the statistics.
    """

    def __init__(self, process_group: str, elements_per_rank: Sequence[int], device: torch.device) -> None:
        self.process_group, self.size, self.elements = process_group, len(elements_per_rank), sum(elements_per_rank)
        weights = torch.tensor(elements_per_rank, dtype=torch.float64) / self.elements
        self.weights = weights.to(device)[:, None, None]  # (R, 1, 1)

    def merge_(self, mean: Tensor, var: Tensor) -> None:
        """Replace this rank's mean and biased variance, (1, D), by those over all ranks."""
        means, variances = self._gather(torch.stack((mean, var))).double().unbind(1)  # (R, 1, D)
        whole = (self.weights * means).sum(0)
        mean.copy_(whole)
        var.copy_((self.weights * (variances + (means - whole).square_())).sum(0))

    def sum_over_ranks(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sum tensors of one shape over all ranks."""
        return self._gather(torch.stack(sums)).sum(0).unbind()

    def _gather(self, own: Tensor) -> Tensor:
        """Gather a tensor from every rank, (R, ...)."""
        collectives = torch.ops._c10d_functional
        everyone = collectives.all_gather_into_tensor(own[None], self.size, self.process_group)
        return collectives.wait_tensor(everyone)  # type: ignore[no-any-return]


def ranks_of(process_group: str, elements_per_rank: Sequence[int], device: torch.device) -> Ranks | None:
    """Return the ranks that share statistics, or None if `elements_per_rank` is empty."""
    return Ranks(process_group, elements_per_rank, device) if elements_per_rank else None
