"""Implementations of `strip_pool`: the eager mean, and ours by each backend."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import rru_fast
from benchmarks.harness.parity import report_parity
from benchmarks.harness.shapes import Shape
from rru_fast import backends
from rru_fast.testing import compare, gradients


def maps(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random maps S (B, T, C, H, W) and a random upstream gradient of their strips (B, C, H)."""
    clips, _, channels, height, _ = shape
    return torch.randn(shape, device=device), torch.randn(clips, channels, height, device=device)


def implementations(device: torch.device) -> dict[str, str]:
    """Return every backend that serves the device, by its name in a table; the reference is the eager mean."""
    return {"eager" if name == "reference" else name: name for name in backends.serving(device, "strip_pool")}


def results(backend: str, s: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Run forward and backward; returns the strips and the gradient of the maps."""
    leaf = s.detach().requires_grad_()
    strips = rru_fast.strip_pool(leaf, backend=backend)
    return {"strips": strips.detach(), **gradients([strips], [upstream.to(s.dtype)], {"s": leaf})}


def check(backends: Mapping[str, str], s: Tensor, upstream: Tensor) -> None:
    """Hold every backend to the eager mean in float64.

    Raises:
        SystemExit: one is wrong.
    """
    in_dtype, oracle = results("reference", s, upstream), results("reference", s.double(), upstream)
    for name, backend in backends.items():
        report_parity(name, [compare(results(backend, s, upstream), in_dtype, oracle)])
