"""rru_fast::strip_pool, eq. 9 alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rru_fast.auto.kinds import strip_pool_key
from rru_fast.composite import strip_pool as composite
from rru_fast.ops._registration import Kernels, choose, kernels, register, without_autocast

KERNELS = kernels("strip_pool", composite)


def _forward(s: Tensor, backend: str) -> Tensor:
    with without_autocast(s):
        strips: Tensor = _choose(backend, s, s.shape).forward(s)
    return strips


def _backward(d_strips: Tensor, s_sizes: list[int], backend: str) -> Tensor:
    with without_autocast(d_strips):
        d_s: Tensor = _choose(backend, d_strips, s_sizes).backward(d_strips, s_sizes[1], s_sizes[4])
    return d_s


def _choose(backend: str, like: Tensor, s_sizes: Sequence[int]) -> Kernels:
    """Choose the kernels for s of these sizes, on the device of `like` and with its dtype."""
    stride = like.stride() if like.dim() == 5 else None
    return choose(
        "strip_pool",
        KERNELS,
        backend,
        like.device,
        lambda: strip_pool_key(like.device, like.dtype, torch.Size(s_sizes), stride, gradients=True),
    )


def _fake(s: Tensor, backend: str) -> Tensor:
    clips, _, channels, height, _ = s.shape
    return s.new_empty(clips, channels, height)


def _fake_backward(d_strips: Tensor, s_sizes: torch.Size, backend: str) -> Tensor:
    return d_strips.new_empty(s_sizes)


strip_pool, strip_pool_backward = register(
    "strip_pool",
    "(Tensor s, str backend) -> Tensor strips",
    "(Tensor d_strips, SymInt[] s_sizes, str backend) -> Tensor d_s",
    (_forward, _backward, _fake, _fake_backward),
)
