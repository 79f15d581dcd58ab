"""The ranks that share their batch statistics, as kernels in Python see them: what each knows, made known to all.

Between the two kernels of a step, forward and backward. Everything is gathered and then summed in the order of the
ranks, so that each has the same bits. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ranks:
    """The ranks of a process group.

    Args:
        process_group: its name in torch.distributed.
        counts: how many values of a gate channel each rank brings.
        device: where the statistics are.
    """

    def __init__(self, process_group: str, counts: Sequence[int], device: torch.device) -> None:
        self.process_group, self.size, self.elements = process_group, len(counts), sum(counts)
        shares = torch.tensor(counts, dtype=torch.float64) / self.elements
        self.shares = shares.to(device)[:, None, None]  # (R, 1, 1)

    def merge_(self, mean: Tensor, var: Tensor) -> None:
        """Replace this rank's mean and biased variance, (1, D), by those of all values of all ranks."""
        means, variances = self._gather(torch.stack((mean, var))).double().unbind(1)  # (R, 1, D)
        whole = (self.shares * means).sum(0)
        mean.copy_(whole)
        var.copy_((self.shares * (variances + (means - whole).square_())).sum(0))

    def total(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sums of this rank's, all of one shape, as those over all ranks."""
        return self._gather(torch.stack(sums)).sum(0).unbind()

    def _gather(self, own: Tensor) -> Tensor:
        """A tensor of every rank, (R, ...)."""
        collectives = torch.ops._c10d_functional
        everyone = collectives.all_gather_into_tensor(own[None], self.size, self.process_group)
        return collectives.wait_tensor(everyone)  # type: ignore[no-any-return]


def ranks_of(process_group: str, counts: Sequence[int], device: torch.device) -> Ranks | None:
    """What the operator's two arguments stand for; None where no rank shares anything."""
    return Ranks(process_group, counts, device) if counts else None
