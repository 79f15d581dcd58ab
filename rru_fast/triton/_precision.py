"""Operand dtypes of matrix products, and the depth of a tile that suits them."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from rru_fast.precision import conv_precision

TL_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation dtype: fp64 for fp64, fp32 otherwise."""
    return torch.promote_types(dtype, torch.float32)


def grad_operand_dtype(dtype: torch.dtype) -> tuple[Any, str]:
    """Operand dtype and precision of gradient GEMMs.

    fp16 gradients can overflow, so they are multiplied in TF32: the same mantissa, the range of fp32.
    """
    if dtype == torch.float16:
        return tl.float32, "tf32"
    return TL_DTYPES[dtype], conv_precision(dtype)


def uses_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Return True if tensor cores multiply this dtype in this precision."""
    return precision != "ieee" or dtype.itemsize == 2


def block_k(dtype: torch.dtype, precision: str, vectorized: bool = True) -> int:
    """Return BLOCK_K; smaller without tensor cores or without vector loads, to limit registers."""
    if dtype.itemsize == 2:
        return 64 if vectorized else 32
    return 32 if precision == "tf32" else 16
