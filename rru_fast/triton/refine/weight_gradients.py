"""The weights' gradients of `refine`, once all dU are known: which kernel is launched, and on what."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton._autotune import KernelConfig
from rru_fast.triton._host import Maps, all_frames
from rru_fast.triton._launch import launch_again
from rru_fast.triton.refine import weight_gradient_kernels as kernels
from rru_fast.triton.refine.arguments import Call, Segment


def outer(left: Tensor, right: Tensor, config: KernelConfig) -> Tensor:
    """left^T right, (M, N), of (N steps, B, M) and (N steps, B, N), summed over steps and clips."""
    m, n = left.shape[2], right.shape[2]
    out = left.new_empty(m, n)
    grid = (-(-m // config["BLOCK_M"]), -(-n // config["BLOCK_N"]))
    k = left.shape[0] * left.shape[1]
    launch_again(kernels.outer_kernel, grid, out=out, left=left, right=right, k_total=k, m_total=m, n_total=n, **config)
    return out


def w_gradient(call: Call, config: KernelConfig, refined: Maps, du: Tensor) -> Tensor:
    """The gradient of w (D, C) or (D, 2C)."""
    d_w = call.empty(*call.w.shape)
    if call.steps == 0:
        return d_w.zero_()
    recurrent = call.recurrent_segments(refined)
    inputs: Sequence[Segment | None] = [None] * len(recurrent) if call.w_x is None else call.input_segments()
    s_half, x_half = call.halves(d_w)
    columns = {"s_column": s_half.storage_offset(), "x_column": 0 if x_half is None else x_half.storage_offset()}
    halves = 1 if x_half is None else 2
    tiles = -(-call.d // config["BLOCK_D"]) * -(-call.channels // config["BLOCK_C"]) * halves
    factor, how = host.grad_operand_dtype(call.x.tensor.dtype)
    split = config["SPLIT"]
    partial = call.empty(tiles * split * config["BLOCK_D"] * config["BLOCK_C"]) if split > 1 else None
    arrivals = call.counters(tiles) if split > 1 else None
    for s, x in zip(recurrent, inputs, strict=True):
        launch_again(
            kernels.weight_gradient_kernel,
            (tiles, split),
            d_w=d_w,
            d_w_row=d_w.stride(0),
            **columns,
            partial=partial,
            arrivals=arrivals,
            du=du[s.first : s.end],
            **all_frames("s", s.maps),
            **all_frames("s_less", s.subtracted),
            **all_frames("x", None if x is None else x.maps),
            **all_frames("x_less", None if x is None else x.subtracted),
            lengths=call.lengths,
            first=call.start + s.first,
            frames=s.end - s.first,
            clips=call.clips,
            channels=call.channels,
            D=call.d,
            P=call.positions,
            HALVES=halves,
            ADD=s.first > 0,
            DOT=factor,
            WIDE=call.wide,
            PRECISION=how,
            **config,
        )
    return d_w
