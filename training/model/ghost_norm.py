"""Ghost batch norm: one network on one GPU stands for the replicas that DataParallel would split its batch among."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.runtime.errors import UserError


class GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that in training normalizes each of G consecutive groups of the batch by its own statistics.

    The running statistics follow the first group, as those of replica 0 do. In eval mode it is a plain batch norm.

    Args:
        norm: the layer it takes the place of; settings, parameters and buffers are that layer's own.
        groups: G.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, groups: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.load_state_dict(norm.state_dict(), assign=True)
        self.train(norm.training)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, ...) to as many; in training, group by group.

        Raises:
            UserError: G does not divide N.
        """
        if not self.training:
            return super().forward(input)
        if len(input) % self.groups:
            raise UserError(f"batch: got {len(input)} for batch norm, wanted a multiple of bn_groups={self.groups}")
        first, *others = input.chunk(self.groups)
        normalized = super().forward(first)
        weight, bias, eps = self.weight, self.bias, self.eps
        return torch.cat(
            [normalized, *(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps) for x in others)]
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing: the layers around it decide between (N, C), (N, C, H, W) and (N, C, T, H, W)."""

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, groups={self.groups}"


def groups_of_each(groups: int, processes: int) -> int:
    """Return the groups per process, of G in all: processes have batch statistics of their own in any case.

    Raises:
        UserError: they cannot be dealt out.
    """
    if groups > 1 and groups % processes:
        raise UserError(f"bn_groups: got {groups} for {processes} processes, wanted a multiple of {processes}, or 1")
    return max(groups // processes, 1)


def use_ghost_norm(module: nn.Module, groups: int) -> None:
    """Put a ghost batch norm in the place of every batch norm inside a module; its state_dict stays as it is."""
    for parent, name, norm in batch_norms(module, f"bn_groups: got {groups}"):
        setattr(parent, name, GhostBatchNorm(norm, groups))


def batch_norms(module: nn.Module, got: str) -> list[tuple[nn.Module, str, nn.modules.batchnorm._BatchNorm]]:
    """List the batch norms inside a module, each with its parent and its name there.

    Args:
        module: all of it.
        got: the option they are replaced for, for the message.

    Raises:
        UserError: one does more than normalize, which a layer in its place would not.
    """
    found: list[tuple[nn.Module, str, nn.modules.batchnorm._BatchNorm]] = []
    for parent in module.modules():
        for name, child in parent.named_children():
            if not isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                continue
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                found.append((parent, name, child))
            else:
                raise UserError(f"{got} with a {type(child).__name__} in the backbone, wanted plain batch norms")
    return found
