"""Batch norm over the clips of all processes, on a CPU too, where PyTorch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from training.model.ghost_norm import batch_norms
from training.runtime import distributed

_total = cast("Callable[[Tensor], Tensor]", all_reduce)  # the sum over all processes, with gradient


class SyncNorm(nn.SyncBatchNorm):
    """A batch norm whose statistics are those of all processes, each of which brings as many values.

    On a GPU it is PyTorch's own, which takes no tensors on a CPU. There it sums in float64, as batch norm does.

    Args:
        norm: the layer it takes the place of; settings, parameters and buffers are that layer's own.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        # The very same objects: an optimizer or DistributedDataParallel may hold them already.
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, ...) to as many."""
        if not self.training or input.device.type != "cpu" or distributed.world() == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        wide = input.double()
        axes, shape = [0, *range(2, input.dim())], (-1, *(1,) * (input.dim() - 2))
        mean = _total(wide.mean(axes)) / distributed.world()
        centered = wide - mean.view(shape)
        var = _total(centered.square().mean(axes)) / distributed.world()
        count = distributed.world() * input.numel() // input.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            for running, now in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                assert running is not None
                running.lerp_(now.to(running.dtype), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centered * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


def use_sync_norm(network: nn.Module) -> None:
    """Put a synchronized batch norm in the place of every batch norm inside a network; its state_dict stays as it is.

    The RRU, whose kernels normalize by themselves, goes by the one it finds.
    """
    for parent, name, norm in batch_norms(network, "sync_bn: got True"):
        setattr(parent, name, SyncNorm(norm))
