"""Precision of fp32 products on a GPU, in place of PyTorch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("ieee", "tf32", "tf32x3")


def matmul_precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products in place of a torch.matmul: PyTorch's setting, or RRU_FAST_FLOAT32."""
    return _precision(dtype, torch.backends.cuda.matmul.fp32_precision)


def conv_precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products in place of an nn.Conv2d: cuDNN's setting, TF32 by default, or RRU_FAST_FLOAT32."""
    return _precision(dtype, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Have PyTorch's convolutions on a GPU multiply fp32 in a precision; "tf32x3" has fp32 serve.

    Changes their setting only if RRU_FAST_FLOAT32 asks for another one, and then for all threads, for as long.
    """
    conv, wanted = torch.backends.cudnn.conv, "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    before = conv.fp32_precision
    if (before == "tf32") == (wanted == "tf32"):
        yield
        return
    conv.fp32_precision = wanted
    try:
        yield
    finally:
        conv.fp32_precision = before


def _precision(dtype: torch.dtype, setting: str) -> str:
    if dtype != torch.float32:
        return "ieee"  # other dtypes have one precision
    requested = os.environ.get("RRU_FAST_FLOAT32", "")
    if requested and requested not in PRECISIONS:
        raise ValueError(f"RRU_FAST_FLOAT32: got {requested!r}, wanted one of {', '.join(PRECISIONS)}")
    return requested or ("tf32" if setting == "tf32" else "ieee")
