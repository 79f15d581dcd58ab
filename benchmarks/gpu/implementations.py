"""Implementations of the unit on a GPU: those of `benchmarks.implementations`, under autocast and as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import rru_fast
from benchmarks.implementations.refine import REFERENCE, Implementation
from rru_fast.testing import gradients

GRAPHED = "eager, graphed"
OURS, OURS_GRAPHED = "triton", "triton, graphed"
CUDA, CUDA_GRAPHED = "cuda", "cuda, graphed"


@dataclass(frozen=True)
class Autocast(Implementation):
    """A unit with float32 weights on bfloat16 maps."""

    def forward(self) -> rru_fast.Refined:
        """Run a forward without gradients under autocast."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            return super().forward()

    def step(self) -> tuple[Tensor, ...]:
        """Run a forward under autocast, and the backward; returns the gradients of x and of every parameter."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            out = self.module(self.x)
        upstream = tuple(u.to(o.dtype) for u, o in zip(self.upstream, out[:2], strict=True))
        return torch.autograd.grad(out[:2], [self.x, *self.module.parameters()], upstream)

    def results(self) -> dict[str, Tensor]:
        """Return the outputs, and the gradients if x requires one, by name."""
        if not self.x.requires_grad:
            return super().results()
        with torch.autocast(self.x.device.type, torch.bfloat16):
            features, strips, _ = self.module(self.x)
        outputs = [features, strips]
        upstream = [u.to(o.dtype) for u, o in zip(self.upstream, outputs, strict=True)]
        found = gradients(outputs, upstream, {"x": self.x, **dict(self.module.named_parameters())})
        return {"features": features.detach(), "strips": strips.detach(), **found}


class GraphedReference(rru_fast.RRU):
    """The reference's operations, captured as a CUDA graph like those of the fast module."""

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        super()._choose_backend("composite", True)
        self.backend = "reference"


def autocast(impl: Implementation) -> Autocast:
    """Return the same module with its maps in bfloat16."""
    return Autocast(impl.module, impl.x.detach().to(torch.bfloat16).requires_grad_(impl.x.requires_grad), impl.upstream)


def graphed(impls: Mapping[str, Implementation], device: torch.device) -> dict[str, Implementation]:
    """Return the reference and ours as CUDA graphs, by name; nothing without a GPU."""
    if device.type != "cuda":
        return {}
    eager = impls[REFERENCE]
    ours = [name for name in (OURS, CUDA) if name == OURS or name in impls]
    return {
        GRAPHED: eager.twin(GraphedReference),
        **{f"{name}, graphed": eager.twin(rru_fast.RRU, backend=name, cuda_graph=True) for name in ours},
    }
