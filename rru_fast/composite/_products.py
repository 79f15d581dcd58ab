"""Matrix products of the transition, in the precision of the convolution that `refine` replaces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# From this many positions, one product per clip is as accurate and as fast as one product of all clips. With fewer, MKL
# accumulates its K terms sequentially: three times the error, and up to twenty times the time.
MIN_POSITIONS_PER_CLIP = 16


def by_convolution(x: Tensor) -> bool:
    """Return True if fp32 products for `x` are convolutions of kernel size 1: on a GPU, except for float64.

    On a GPU an nn.Conv2d follows `torch.backends.cudnn`, TF32 by default, and a matrix product
    `torch.backends.cuda.matmul`, fp32 by default. A convolution follows its settings without reading or changing them.
    16-bit inputs, which nn.Conv2d multiplies in 16 bits, are multiplied in fp32 here, and so in TF32 too.
    """
    return x.is_cuda and x.dtype != torch.float64


class Products:
    """Products of the transition's weight with feature maps of an input `x`, and the weight's gradient."""

    def __init__(self, x: Tensor) -> None:
        self.convolve = by_convolution(x)

    def multiply(self, out: Tensor, weight: Tensor, maps: Tensor) -> Tensor:
        """Set `out` (B, M, P) to weight (M, K) times each clip of `maps` (B, K, P)."""
        if self.convolve or maps.shape[2] < MIN_POSITIONS_PER_CLIP:
            return out.copy_(self._product(weight, maps))
        return torch.bmm(weight.expand(len(maps), *weight.shape), maps, out=out)

    def add_product(self, out: Tensor, weight: Tensor, maps: Tensor) -> Tensor:
        """Add weight (M, K) times each clip of `maps` (B, K, P) to `out` (B, M, P)."""
        if self.convolve or maps.shape[2] < MIN_POSITIONS_PER_CLIP:
            return out.add_(self._product(weight, maps))
        return out.baddbmm_(weight.expand(len(maps), *weight.shape), maps)

    def add_outer(self, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Add left (B, K, P) times the transpose of right (B, M, P), summed over clips, to `out` (K, M)."""
        if not self.convolve:
            return out.addbmm_(left, right.mT)
        # A forward convolution with B P input channels: cuDNN may sum its weight gradients in any order.
        weight = left.transpose(0, 1).flatten(1)  # (K, B P): K filters over the M positions of one clip
        return out.add_(F.conv1d(right.mT.flatten(0, 1), weight[:, :, None]))

    def _product(self, weight: Tensor, maps: Tensor) -> Tensor:
        """Return weight (M, K) times each clip of `maps` (B, K, P) in new memory."""
        if self.convolve:
            return F.conv1d(maps, weight[:, :, None])
        clips, _, positions = maps.shape
        columns = maps.mT.flatten(0, 1)  # (B P, K)
        return (columns @ weight.t()).view(clips, positions, len(weight)).mT
