"""Device functions that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from rru_fast.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def cast_rn(v, DTYPE: tl.constexpr):
    """Round v to the nearest value of DTYPE. Triton 3.6's interpreter truncates fp32 to bf16, where a GPU rounds."""
    if INTERPRETED and DTYPE == tl.bfloat16 and v.dtype == tl.float32:
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def to_tf32(v):
    """Round v to TF32's 10 bits of mantissa, ties away from 0, and keep NaN: tensor cores truncate."""
    if INTERPRETED:
        bits = (v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def dot(v, w, acc, PRECISION: tl.constexpr):
    """Return acc + v w. Triton 3.6's interpreter multiplies bf16's bits as integers: there operands are widened."""
    if PRECISION == "tf32":
        v = to_tf32(v)
        w = to_tf32(w)
    if INTERPRETED and v.dtype == tl.bfloat16:
        v = v.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(v, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def normalize(u, mean, var, gate, d, p, m_dp, D: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr):
    """Return Uhat and Y = relu(gamma Uhat + beta), [BLOCK_D, BLOCK_P], of a clip's U (D, P), and gamma r, [BLOCK_D].

    Args:
        u: pointer to the clip's U.
        mean, var: pointers to the statistics of the clip's group.
        gate: gate weights, gamma and beta among them.
        d, p, m_dp: indices, and the mask outside of which Uhat and Y are 0.
    """
    ACC: tl.constexpr = u.dtype.element_ty
    m_d = d < D
    r = tl.rsqrt(tl.load(var + d, m_d, 1.0).to(ACC) + EPS)
    b_gamma = tl.load(gate.gamma + d, m_d, 0.0).to(ACC)
    b_mean = tl.load(mean + d, m_d, 0.0).to(ACC)
    uhat = tl.load(u + d[:, None] * P + p[None, :], m_dp, 0.0) - b_mean[:, None]
    uhat = tl.where(m_dp, uhat * r[:, None], 0.0)
    y = uhat * b_gamma[:, None] + tl.load(gate.beta + d, m_d, 0.0).to(ACC)[:, None]
    return uhat, tl.where(m_dp & ~(y <= 0), y, 0.0), b_gamma * r  # keeps a NaN


@triton.jit
def grid_last_arrival(arrivals, expected):
    """Return True in the last of `expected` programs to arrive at a counter, after which all their stores are visible.

    The counter is 0 again afterwards, for the next launch.
    """
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(arrivals, 1) == expected - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def sum_split(acc, partials, arrivals, tile, part, SPLIT: tl.constexpr):
    """Sum the SPLIT parts of a tile, [M, N], in the last of its programs to arrive, in a fixed order.

    Args:
        acc: this program's part.
        partials: (tiles, SPLIT, M, N), scratch; arrivals: (tiles,), zeros. Not read if SPLIT is 1.

    Returns:
        The sum, and True in that program alone.
    """
    last = True
    if SPLIT > 1:
        M: tl.constexpr = acc.shape[0]
        N: tl.constexpr = acc.shape[1]
        p_partials = partials + tile.to(tl.int64) * (SPLIT * M * N)
        p_partials += tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(p_partials + part * (M * N), acc)
        last = grid_last_arrival(arrivals + tile, SPLIT)
        if last:
            acc = tl.load(p_partials, cache_modifier=".cg")
            for other in range(1, SPLIT):
                acc += tl.load(p_partials + other * (M * N), cache_modifier=".cg")
    return acc, last
