"""Kernel around `to_tf32`, at module level: the interpreter looks names up in the module that defines a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton._primitives import to_tf32


@triton.jit
def rounding_kernel(out, v, N: tl.constexpr):
    """out = v rounded to TF32, both (N,)."""
    i = tl.arange(0, N)
    tl.store(out + i, to_tf32(tl.load(v + i)))
