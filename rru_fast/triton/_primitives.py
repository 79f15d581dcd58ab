"""What the kernels share on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def narrowed(v, TYPE: tl.constexpr):
    """v rounded to TYPE. Triton 3.6's interpreter cuts a float32 off at bfloat16 where a GPU rounds to nearest."""
    if INTERPRETED and TYPE == tl.bfloat16 and v.dtype == tl.float32:
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(TYPE)


@triton.jit
def to_tf32(v):
    """v rounded to TF32's 10 bits of mantissa, ties away from 0, NaN kept: the matrix units just cut the rest off."""
    if INTERPRETED:
        bits = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def product(v, w, acc, PRECISION: tl.constexpr):
    """acc + v w. Triton 3.6's interpreter multiplies bfloat16's bits as integers: there the factors are widened."""
    if PRECISION == "tf32":
        v = to_tf32(v)
        w = to_tf32(w)
    if INTERPRETED and v.dtype == tl.bfloat16:
        v = v.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(v, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def normalise(u, mean, var, gamma, beta, d, p, inside, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr):
    """Uhat and Y = relu(gamma Uhat + beta) [BLOCK_D, BLOCK_P] of a clip's U (D, P), 0 outside; gamma r [BLOCK_D]."""
    SUM: tl.constexpr = u.dtype.element_ty
    here = d < D
    r = tl.rsqrt(tl.load(var + d, here, 1.0).to(SUM) + EPS)
    scale = tl.load(gamma + d, here, 0.0).to(SUM)
    uhat = tl.load(u + d[:, None] * P + p[None, :], inside, 0.0) - tl.load(mean + d, here, 0.0).to(SUM)[:, None]
    uhat = tl.where(inside, uhat * r[:, None], 0.0)
    y = uhat * scale[:, None] + tl.load(beta + d, here, 0.0).to(SUM)[:, None]
    return uhat, tl.where(inside & ~(y <= 0), y, 0.0), scale * r  # a NaN stays one


@triton.jit
def last_to_arrive(arrivals, expected):
    """Whether all other programs that call this on the same counter have; what they stored before can then be read.

    The counter is 0 again afterwards, for the next launch.
    """
    tl.debug_barrier()  # of this program's threads: all have stored
    last = tl.atomic_add(arrivals, 1) == expected - 1
    if last:
        tl.store(arrivals, 0)
    return last
