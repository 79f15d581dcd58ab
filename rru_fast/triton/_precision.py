"""Shared host code of the operators: addresses of maps, and the precision of products."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

PRECISIONS = ("ieee", "tf32", "tf32x3")
# For kernels of about as many programs as fit at once: registers are not spilled to make room for more.
ALL_REGISTERS = {"maxnreg": 255}
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels are launched where the tensor is, not on whichever device is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def matmul_precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products that stand for a torch.matmul: PyTorch's setting, or RRU_FAST_FLOAT32."""
    return _precision(dtype, torch.backends.cuda.matmul.fp32_precision)


def conv_precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products that replace an nn.Conv2d's: cuDNN's setting, TF32 by default, or RRU_FAST_FLOAT32."""
    return _precision(dtype, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]


def _precision(dtype: torch.dtype, setting: str) -> str:
    if dtype != torch.float32:
        return "ieee"  # the others have one precision
    asked = os.environ.get("RRU_FAST_FLOAT32", "")
    if asked and asked not in PRECISIONS:
        raise ValueError(f"RRU_FAST_FLOAT32: got {asked!r}, wanted one of {', '.join(PRECISIONS)}")
    return asked or ("tf32" if setting == "tf32" else "ieee")


def grad_operand_dtype(dtype: torch.dtype) -> tuple[Any, str]:
    """Operand dtype and precision of gradient GEMMs.

    fp16 gradients can overflow, so they are multiplied in TF32: the same mantissa, the range of fp32.
    """
    if dtype == torch.float16:
        return tl.float32, "tf32"
    return TYPES[dtype], conv_precision(dtype)


def even(tensor: Tensor, dims: int) -> bool:
    """Whether what lies behind the first so many strides is 16 bytes apart; else each element takes its own address."""
    return all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:dims]) and tensor.stride(-1) == 1


def depth(dtype: torch.dtype, how: str, even: bool = True) -> int:
    """Terms that a product of `dtype` takes at a time: what fits the registers where no matrix unit does it.

    even: whether the elements lie so that a thread loads several by one address.
    """
    if dtype.itemsize == 2:
        return 64 if even else 32
    return 32 if how == "tf32" else 16


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device, which a launch should fill; an H100's number where there is no GPU."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def power_of_2(n: int) -> int:
    """The least power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()


class Maps(NamedTuple):
    """Maps (B, F, C, P) as kernels take them: a pointer and four strides."""

    tensor: Tensor
    clip: int
    frame: int
    channel: int
    position: int

    @property
    def wide(self) -> bool:
        """Whether an offset within a frame may need more than 31 bits."""
        _, _, channels, height, width = self.tensor.shape
        return (channels - 1) * self.channel + (height * width - 1) * self.position >= 2**31


def frame_strides(name: str, maps: Maps | None) -> dict[str, int]:
    """Strides of the kernel argument `name`, one frame of `maps`; zeros without one."""
    clip, channel, position = (0, 0, 0) if maps is None else (maps.clip, maps.channel, maps.position)
    return {f"{name}_clip": clip, f"{name}_channel": channel, f"{name}_position": position}


def all_frames(name: str, maps: Maps | None) -> dict[str, Any]:
    """The kernel argument `name`, all frames of `maps`, with its strides; None and zeros without maps."""
    tensor, frame = (None, 0) if maps is None else (maps.tensor, maps.frame)
    return {name: tensor, f"{name}_frame": frame, **frame_strides(name, maps)}


def maps(tensor: Tensor) -> Maps:
    """(B, F, C, H, W) in place, NCHW and channels-last among others; a copy where positions do not lie evenly."""
    height, width = tensor.shape[3:]
    clip, frame, channel, row, column = tensor.stride()
    if width == 1:
        column = row
    if height > 1 and width > 1 and row != width * column:
        return maps(tensor.contiguous())
    return Maps(tensor, clip, frame, channel, column)
