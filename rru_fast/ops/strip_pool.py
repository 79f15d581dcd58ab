"""rru_fast::strip_pool, eq. 9 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rru_fast.composite import strip_pool as composite
from rru_fast.cpu import strip_pool as cpu
from rru_fast.ops._registration import choose, forbid_second_order, kernels, without_autocast

KERNELS = kernels("strip_pool", composite, cpu)


@torch.library.custom_op("rru_fast::strip_pool", mutates_args=())
def strip_pool(s: Tensor, backend: str) -> Tensor:
    """Average s (B, T, C, H, W) over time and width: (B, C, H)."""
    with without_autocast(s):
        strips: Tensor = choose(KERNELS, backend, s.device).forward(s)
    return strips


@strip_pool.register_fake
def _(s: Tensor, backend: str) -> Tensor:
    clips, _, channels, height, _ = s.shape
    return s.new_empty(clips, channels, height)


@torch.library.custom_op("rru_fast::strip_pool_backward", mutates_args=())
def strip_pool_backward(d_strips: Tensor, frames: int, width: int, backend: str) -> Tensor:
    """Return the gradient of s, (B, T, C, H, W)."""
    with without_autocast(d_strips):
        d_s: Tensor = choose(KERNELS, backend, d_strips.device).backward(d_strips, frames, width)
    return d_s


@strip_pool_backward.register_fake
def _(d_strips: Tensor, frames: int, width: int, backend: str) -> Tensor:
    clips, channels, height = d_strips.shape
    return d_strips.new_empty(clips, frames, channels, height, width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    s, ctx.backend = inputs
    ctx.frames, ctx.width = s.shape[1], s.shape[4]


def _backward(ctx: Any, d_strips: Tensor) -> tuple[Tensor, None]:
    return strip_pool_backward(d_strips, ctx.frames, ctx.width, ctx.backend), None


strip_pool.register_autograd(_backward, setup_context=_setup)
forbid_second_order(strip_pool_backward, "rru_fast.strip_pool")
