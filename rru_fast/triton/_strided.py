"""Tensors with their strides, each one argument of a kernel: Triton takes a NamedTuple, and None in its place."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class StridedMaps(NamedTuple):
    """Feature maps (B, F, C, P), P = H W positions at one stride; or strips, P = H."""

    ptr: Any
    """Tensor (B, F, C, H, W), one frame of it, or its slices per frame."""
    clip: int
    frame: int
    channel: int
    position: int


class StridedFeatures(NamedTuple):
    """Features (G, N, D)."""

    ptr: Tensor
    group: int
    row: int
    column: int


class StridedAnchors(NamedTuple):
    """Values per anchor (G, N)."""

    ptr: Tensor
    group: int
    anchor: int


class StridedMatrix(NamedTuple):
    """Matrix with contiguous rows."""

    ptr: Tensor
    row: int


class StridedVector(NamedTuple):
    """Vector."""

    ptr: Tensor
    element: int


def as_strided_maps(tensor: Tensor) -> StridedMaps:
    """View (B, F, C, H, W) in place, NCHW, channels-last and others; copy if positions are not at one stride."""
    height, width = tensor.shape[3:]
    clip, frame, channel, row, column = tensor.stride()
    if width == 1:
        column = row
    if height > 1 and width > 1 and row != width * column:
        return as_strided_maps(tensor.contiguous())
    return StridedMaps(tensor, clip, frame, channel, column)


def needs_int64(maps: StridedMaps) -> bool:
    """Return True if an offset within a frame may need more than 31 bits."""
    _, _, channels, height, width = maps.ptr.shape
    return bool((channels - 1) * maps.channel + (height * width - 1) * maps.position >= 2**31)


def vectorizable(tensor: Tensor, dims: int) -> bool:
    """Return True if a thread can load 16 bytes at once at every index of the first `dims` dimensions."""
    return all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:dims]) and tensor.stride(-1) == 1
