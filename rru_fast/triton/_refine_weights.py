"""The weights' gradients of `refine`, once all dU are known: which kernel is launched, and on what."""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.triton import _host as host
from rru_fast.triton import _refine_backward_kernels as kernels
from rru_fast.triton._host import Maps
from rru_fast.triton._plans import Meta
from rru_fast.triton._refine_call import NOTHING, Call, frames_from


def outer(left: Tensor, right: Tensor, meta: Meta) -> Tensor:
    """left^T right, (M, N), of (N steps, B, M) and (N steps, B, N), summed over steps and clips."""
    m, n = left.shape[2], right.shape[2]
    out = left.new_empty(m, n)
    grid = (-(-m // meta["BLOCK_M"]), -(-n // meta["BLOCK_N"]))
    host.launch(kernels.outer_kernel, grid, out, left, right, left.shape[0] * left.shape[1], m, n, **meta)
    return out


def w_gradient(call: Call, meta: Meta, refined: Maps, du: Tensor) -> Tensor:
    """The gradient of w (D, C) or (D, 2C)."""
    d_w = call.empty(*call.w.shape)
    d_w_s, d_w_x = call.halves(d_w)
    like_s: list[tuple[int, int, Maps, Maps | None]] = []
    if call.state_s is not None:
        like_s.append((0, 1, call.x, call.state_s))
    if call.frames > 1:
        like_s.append((1 - call.start, call.steps, frames_from(call.x, 1), refined))
    if call.inputs == "raw":
        like_s = [(begin, end, s, None) for begin, end, _, s in like_s]  # type: ignore[misc]
    for out, runs in ((d_w_s, like_s), (d_w_x, call.unlike_s())):
        if out is not None:
            parts = [_run(call, meta, du, *run) for run in runs if run[1] > run[0]]
            out.copy_(torch.cat(parts).sum(0) if parts else torch.zeros_like(out))
    return d_w


def _run(call: Call, meta: Meta, du: Tensor, begin: int, end: int, maps: Maps, subtracted: Maps | None) -> Tensor:
    """dU times (maps - subtracted)^T of steps begin to end, (SPLIT, D, C), to be summed."""
    factor, how = host.factors(call.x.tensor.dtype)
    parts = call.empty(meta["SPLIT"], call.d, call.channels)
    tiles = -(-call.d // meta["BLOCK_D"]) * -(-call.channels // meta["BLOCK_C"])
    host.launch(
        kernels.weight_gradient_kernel,
        (tiles, meta["SPLIT"]),
        parts,
        du[begin:end],
        *maps,
        *(NOTHING if subtracted is None else subtracted),
        call.lengths,
        call.start + begin,
        end - begin,
        call.clips,
        call.channels,
        D=call.d,
        P=call.positions,
        DOT=factor,
        WIDE=call.wide,
        PRECISION=how,
        **meta,
    )
    return parts
