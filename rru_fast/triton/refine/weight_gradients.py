"""Launches of the weights' gradients of `refine`, once all dU are known."""

from __future__ import annotations

from torch import Tensor

from rru_fast.triton._autotune import KernelConfig
from rru_fast.triton._launch import cdiv, launch_cached
from rru_fast.triton._precision import grad_operand_dtype
from rru_fast.triton._strided import StridedMaps, StridedMatrix
from rru_fast.triton.refine import weight_gradient_kernels as kernels
from rru_fast.triton.refine.arguments import Call


def atb(a: Tensor, b: Tensor, config: KernelConfig) -> Tensor:
    """Return a^T b, (M, N), of a (N steps, B, M) and b (N steps, B, N), summed over steps and clips."""
    steps, clips, m = a.shape
    n = b.shape[2]
    out = a.new_empty(m, n)
    launch_cached(
        kernels.atb_kernel,
        (cdiv(m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"])),
        out=out,
        a=a,
        b=b,
        k_total=steps * clips,
        m_total=m,
        n_total=n,
        **config,
    )
    return out


def w_gradient(call: Call, config: KernelConfig, refined: StridedMaps, du: Tensor) -> Tensor:
    """Return the gradient of w, (D, C) or (D, 2C), from S and dU (N, B, D, P)."""
    d_w = call.empty(*call.w.shape)
    if call.steps == 0:
        return d_w.zero_()
    d_recurrent, d_input = call.split(d_w)
    halves, split = 1 if d_input is None else 2, config["SPLIT"]
    tiles = cdiv(call.d, config["BLOCK_D"]) * cdiv(call.channels, config["BLOCK_C"]) * halves
    partials = call.empty(tiles * split * config["BLOCK_D"] * config["BLOCK_C"]) if split > 1 else None
    arrivals = call.counters(tiles) if split > 1 else None
    operand_dtype, precision = grad_operand_dtype(call.args.x.dtype)
    recurrent = call.recurrent_segments(refined)
    for i, (recurrent_segment, input_segment) in enumerate(zip(recurrent, call.input_segments(), strict=True)):
        first, end, operand = recurrent_segment
        launch_cached(
            kernels.refine_bwd_dw_kernel,
            (tiles, split),
            d_w=StridedMatrix(d_w, d_w.stride(0)),
            recurrent_column=d_recurrent.ptr.storage_offset(),
            input_column=0 if d_input is None else d_input.ptr.storage_offset(),
            partials=partials,
            arrivals=arrivals,
            du=du[first:end],
            recurrent_operand=operand,
            input_operand=None if d_input is None else input_segment.operand,
            lengths=call.args.lengths,
            t_first=call.start + first,
            frames=end - first,
            clips=call.clips,
            channels=call.channels,
            D=call.d,
            P=call.positions,
            HALVES=halves,
            ACCUMULATE=i > 0,
            OPERAND_DTYPE=operand_dtype,
            INT64_OFFSETS=call.int64_offsets,
            PRECISION=precision,
            **config,
        )
    return d_w
