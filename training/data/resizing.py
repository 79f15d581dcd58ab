"""Pillow's bicubic resize, for a batch at once, on any device."""

from __future__ import annotations

from typing import Literal, TypeAlias

import PIL
import torch
import torch.nn.functional as F
from torch import Tensor

Resize: TypeAlias = Literal["device", "pillow"]
"""Resize on the network's device by `resize`, or one by one by Pillow as frames are read."""

# From version 13 on Pillow does the vertical pass first where that is less work: python-pillow/Pillow#9549.
_VERTICAL_MAY_BE_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames like `Image.resize(..., BICUBIC)` of the installed Pillow, within 2 of 255 levels.

    Rounds and clips after each of the two passes, as Pillow does. PyTorch's two-dimensional kernel for floats does
    neither in between, and is off by up to 30 levels at edges between black and white.

    Args:
        pixels: (N, 3, h, w): on a CPU uint8, on a GPU float32 that holds whole numbers from 0 to 255.
        size: height and width of the result, pixels.

    Returns:
        (N, 3, *size), of the dtype of `pixels`, whole numbers from 0 to 255.
    """
    (h, w), (height, width) = pixels.shape[2:], size
    # With one column both orders give the same, and PyTorch's kernels are wrong for a result of one column that is not
    # stored channels last.
    vertical_first = _VERTICAL_MAY_BE_FIRST and w > 1 and h > height and h - height > 2 * (w - width)
    for step in ((height, w) if vertical_first else (h, width), (height, width)):
        if step != pixels.shape[2:]:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            pixels = F.interpolate(pixels, step, mode="bicubic", antialias=True)
            if pixels.is_floating_point():
                pixels = pixels.add_(0.5).floor_().clamp_(0, 255)
    return pixels
