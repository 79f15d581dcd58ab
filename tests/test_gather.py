"""`BatchHardTripletLoss(gather=True)`: the loss of the features of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import rru_fast
from rru_fast import reference
from tests.ranks import in_ranks


def with_strips(loss: nn.Module, features: Tensor, labels: Tensor, *gallery: Tensor) -> list[Tensor]:
    """Return the loss of (N, D) and of strips (G, N, D) that are not contiguous, and the distances if there are any."""
    found: list[Tensor] = []
    for split in (lambda f: f, lambda f: f.unflatten(1, (3, 2)).permute(2, 0, 1)):
        out = loss(split(features), labels, *(split(v) if v.is_floating_point() else v for v in gallery))
        found += out if isinstance(out, tuple) else [out]
    return found


def total(outputs: list[Tensor]) -> Tensor:
    """Sum the finite numbers, each with a weight of its own."""
    weights = torch.linspace(0.5, 1.5, max(out.numel() for out in outputs), dtype=torch.float64)
    finite = [torch.where(out.isfinite(), out, 0).flatten() for out in outputs]
    return torch.stack([(out * weights[: len(out)]).sum() for out in finite]).sum()


def gathered_losses(rank: int) -> None:
    """Assert that losses and gradients on each rank equal those of one process with the clips of all ranks."""
    for ends in ([4, 8, 12], [1, 10, 12], [0, 5, 12]):  # equal numbers of clips, unequal ones, and none on rank 0
        _gathered_loss(rank, ends)
        _gathered_loss(rank, ends, gallery=[12 - end for end in ends[::-1]])
    _gathered_loss(rank, [4, 8, 12], reduction="sum")
    for gallery in (None, [0, 5, 12]):
        for metric in ("euclidean", "cosine"):
            options = {"reduction": "none", "return_distances": True, "metric": metric}
            _gathered_loss(rank, [0, 5, 12], gallery=gallery, **options)
    _gathered_loss(rank, [4, 8, 12], margin="soft")


def _gathered_loss(rank: int, ends: list[int], gallery: list[int] | None = None, **options: Any) -> None:
    world = dist.get_world_size()
    options = {"margin": 2.0, **options}

    def mine(ends: list[int]) -> slice:
        ends = [*ends[: world - 1], 12]
        return slice(0 if rank == 0 else ends[rank - 1], ends[rank])

    for cls in (rru_fast.BatchHardTripletLoss, reference.BatchHardTripletLoss):
        torch.manual_seed(0)
        embed = nn.Linear(5, 6).double()
        data, labels = torch.randn(2, 12, 5, dtype=torch.float64), torch.arange(12) // 3
        others = labels.flip(0) + 1  # the gallery has none of label 0
        whole = embed(data.flatten(0, 1)).view(2, 12, 6)
        more = () if gallery is None else (whole[1], others)
        alone = with_strips(cls(**options), whole[0], labels, *more)
        wanted = torch.autograd.grad(total(alone), list(embed.parameters()))
        model = DistributedDataParallel(embed)
        here = [data[0, mine(ends)], *([] if gallery is None else [data[1, mine(gallery)]])]
        parts = model(torch.cat(here)).split([len(part) for part in here])
        more = () if gallery is None else (parts[1], others[mine(gallery)])
        outputs = with_strips(cls(gather=True, **options), parts[0], labels[mine(ends)], *more)
        total(outputs).backward()
        for got, expected in zip(outputs, alone, strict=True):
            assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12), (got, expected)
        for parameter, gradient in zip(embed.parameters(), wanted, strict=True):
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12), (parameter.grad, gradient)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_gathered_loss_of_several_processes_equals_that_of_one(processes: int, tmp_path: Path) -> None:
    in_ranks(processes, tmp_path, gathered_losses)


class Mined(TorchDispatchMode):
    """Record the numbers of anchors and candidates of every call of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rru_fast.batch_hard.default:
            features, _, gallery, *_ = args
            self.sizes.append((len(features), len(gallery)))
        return func(*args, **(kwargs or {}))


def bank_and_low_precision(rank: int) -> dict[str, Any]:
    """Return what is mined in a memory bank without gradients, and a loss in bfloat16 next to that of all in one."""
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(16, 6, generator=g).bfloat16(), (torch.arange(16) // 4).short()
    mine = slice(4 * rank, 4 + 12 * rank)
    leaf = features[mine].requires_grad_()
    with Mined() as mined:
        loss = rru_fast.BatchHardTripletLoss(gather=True)(leaf, labels[mine])
        loss.backward()
        rru_fast.BatchHardTripletLoss(gather=True)(leaf, labels[mine], features, labels).backward()
    return {"sizes": mined.sizes, "loss": loss, "alone": rru_fast.BatchHardTripletLoss()(features, labels)}


def test_each_rank_mines_for_its_own_anchors_and_shares_distances_in_float32(tmp_path: Path) -> None:
    found = in_ranks(2, tmp_path, bank_and_low_precision)
    assert [rank["sizes"] for rank in found] == [[(4, 16), (4, 32)], [(12, 16), (12, 32)]]
    for rank in found:
        assert rank["loss"].dtype == torch.bfloat16
        assert rank["loss"] == rank["alone"] > 0


def mismatch_errors(rank: int) -> dict[str, str]:
    """Return the error of each call that mismatches the other rank; a matching call after each still works."""
    f, labels = torch.randn(4, 6), torch.arange(4) // 2
    calls = {
        "columns": (f[:, : 5 + rank], labels),
        "groups": (f.expand(2 + rank, 4, 6), labels),
        "dimensions": (f if rank else f[None], labels),
        "dtypes": (f.double() if rank else f, labels),
        "labels": (f, labels.int() if rank else labels),
        "nothing": (f[:0], labels[:0]),
        "gallery's columns": (f, labels, f[:, : 5 + rank], labels),
        "gallery's labels": (f, labels, f, labels.int() if rank else labels),
        "no gallery": (f, labels, f[:0], labels[:0]),
        "some": (f, labels, f, labels) if rank else (f, labels),
        "other columns": (f, labels, f[:, :5], labels),
        "labels of no integers": (f[: 4 * rank], labels[: 4 * rank].float()),
    }
    found = {}
    loss = rru_fast.BatchHardTripletLoss(gather=True)
    for name, arguments in calls.items():
        try:
            loss(*arguments)
        except (ValueError, TypeError) as error:
            found[name] = str(error)
        loss(f[rank:], labels[rank:])
    return found


def test_mismatched_ranks_raise_on_every_rank(tmp_path: Path) -> None:
    messages = in_ranks(2, tmp_path, mismatch_errors)
    assert messages[0] == messages[1]
    assert messages[0] == {
        "columns": "features: got [5, 6] columns on the ranks, wanted as many on every rank",
        "groups": "features: got [2, 3] groups on the ranks, wanted as many on every rank",
        "dimensions": "features: got [3, 2] dimensions on the ranks, wanted as many on every rank",
        "dtypes": "features: got [float32, float64] dtypes on the ranks, wanted one on every rank",
        "labels": "labels: got [int64, int32] dtypes on the ranks, wanted one on every rank",
        "nothing": "features: got none on any rank, wanted at least 1 on one of them",
        "gallery's columns": "gallery: got [5, 6] columns on the ranks, wanted as many on every rank",
        "gallery's labels": "gallery_labels: got [int64, int32] dtypes on the ranks, wanted one on every rank",
        "no gallery": "gallery: got none on any rank, wanted at least 1 on one of them",
        "some": "gallery: got one on some of the ranks, wanted one on every rank or on none",
        "other columns": "gallery: got shape (4, 5), wanted (4, 6) = (M, D) or (G, M, D) as features",
        "labels of no integers": "labels: got dtype torch.float32, wanted an integer dtype",
    }


def test_gather_without_a_process_group_is_a_group_of_one() -> None:
    features, labels = torch.randn(8, 4), torch.arange(8) // 2
    assert torch.equal(
        rru_fast.BatchHardTripletLoss(gather=True)(features, labels), rru_fast.BatchHardTripletLoss()(features, labels)
    )
