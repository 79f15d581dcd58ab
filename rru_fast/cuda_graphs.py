"""CUDA graphs of `refine`: a repeated call takes one launch for forward and one for backward.

A graph reads and writes static memory. Inputs are copied in; weights and running statistics are used in place, so a
module whose parameters have moved is captured again. The next call with the same key overwrites the outputs: a backward
after it raises. The key (`graph_key`) contains everything that decides which kernels run, such as the precision of fp32
products.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from rru_fast import checks
from rru_fast.distributed import spans_ranks
from rru_fast.types import Refined, State

# Graphs per module; beyond it the oldest is dropped. Each holds the memory of its inputs, forward and backward.
MAX_GRAPHS = 8

WEIGHTS = ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")
RUNNING = ("running_mean", "running_var")

Function = Callable[..., tuple[Tensor, ...]]

_capturing = threading.Lock()


class Graphs:
    """CUDA graphs of one module."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[Function, list[int]]] = {}

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        """Copy as an empty cache: a copied module captures its own graphs."""
        return Graphs, ()

    def refine(self, refine: Callable[..., Refined], x: Tensor, arguments: dict[str, Any]) -> Refined:
        """Run refine(x, **arguments) as a graph, captured at the first call with its key.

        Raises:
            ValueError, TypeError: x is not on a GPU, ranks share statistics, or an argument does not fit.
        """
        # Before anything is copied or captured, so that an error changes nothing and lengths on a CPU are read there.
        checks.check_refine(x, **{name: value for name, value in arguments.items() if name != "backend"})
        if arguments["training"] and spans_ranks(arguments["process_group"]):
            raise ValueError("cuda_graph: got True with batch statistics over several ranks, wanted False")
        if x.device.type != "cuda":
            raise ValueError(f"cuda_graph: got True with tensors on {x.device}, wanted tensors on a GPU")
        settings = dict(arguments)
        state, lengths = settings.pop("state"), settings.pop("lengths")
        weights = {name: weight for name in WEIGHTS if (weight := settings.pop(name)) is not None}
        running = [tensor for name in RUNNING if (tensor := settings[name]) is not None]
        maps: dict[str, Tensor] = {"x": x}
        if lengths is not None:
            maps["lengths"] = lengths.to(x.device, torch.int64)
        if state is not None:
            maps["state_x"], maps["state_s"] = state
        names = (*weights, *maps)

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given: dict[str, Any] = dict(zip(names, tensors, strict=True))
            if "state_x" in given:
                given["state"] = State(given.pop("state_x"), given.pop("state_s"))
            out = refine(given.pop("x"), **given, **settings)
            return (out.features, out.strips) if out.state is None else (out.features, out.strips, *out.state)

        differentiable = torch.is_grad_enabled()
        rest = tuple(value for name, value in settings.items() if name not in RUNNING)
        key = graph_key(weights, running, maps, rest)
        if key not in self._captured:
            while len(self._captured) >= MAX_GRAPHS:
                del self._captured[next(iter(self._captured))]
            samples = [v.detach() for v in weights.values()] + [v.detach().clone() for v in maps.values()]
            for sample, v in zip(samples, (*weights.values(), *maps.values()), strict=True):
                sample.requires_grad_(differentiable and v.requires_grad)
            with torch.cuda.device(x.device):
                self._captured[key] = _capture(call, samples, running), [0]
        graphed, calls = self._captured[key]
        calls[0] += 1
        with torch.cuda.device(x.device):
            outputs = graphed(*map(_clone_gradient, (*weights.values(), *maps.values())))
        features, strips, *last = expire_on_replay(calls, outputs)
        return Refined(features, strips, State(*last) if last else None)


def graph_key(
    weights: dict[str, Tensor], running: list[Tensor], maps: dict[str, Tensor], settings: tuple[Hashable, ...]
) -> Hashable:
    """Return the key of a graph: layouts and dtypes of tensors, addresses of weights, and PyTorch's global settings."""
    return (
        *weights,
        *maps,
        *((v.shape, v.stride(), v.dtype, v.requires_grad) for v in (*weights.values(), *maps.values())),
        *(v.data_ptr() for v in (*weights.values(), *running)),
        *settings,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        os.environ.get("RRU_FAST_FLOAT32"),
    )


def _capture(call: Function, samples: list[Tensor], running: list[Tensor]) -> Function:
    """Capture `call` as a graph, with gradients, and restore the running statistics that its warm-up runs changed."""
    before = [tensor.clone() for tensor in running]
    try:
        with torch.autocast("cuda", enabled=False):  # the kernels choose their own dtypes
            graphed = make_graphed(call, tuple(samples))
    finally:
        for tensor, value in zip(running, before, strict=True):
            tensor.copy_(value)
    return graphed


def make_graphed(call: Function, samples: tuple[Tensor, ...]) -> Function:
    """Call torch.cuda.make_graphed_callables in capture mode "thread_local", which permits calls by other threads.

    In the default mode cudaHostAlloc fails in every thread during capture, such as a DataLoader's pin_memory thread.
    """
    make: Any = torch.cuda.make_graphed_callables
    mode = {"capture_error_mode": "thread_local"}
    if "capture_error_mode" in signature(make).parameters:  # newer than torch 2.11
        return cast(Function, make(call, samples, allow_unused_input=True, **mode))
    with _capturing:  # two threads would restore each other's patch
        graph: Any = torch.cuda.graph
        torch.cuda.graph = partial(graph, **mode)  # type: ignore[misc,assignment]
        try:
            return cast(Function, make(call, samples, allow_unused_input=True))
        finally:
            torch.cuda.graph = graph  # type: ignore[misc]


class _CloneGradient(torch.autograd.Function):
    """Identity whose backward clones the gradient: the next replay overwrites the graph's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return a view of the tensor."""
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Clone the gradient."""
        return gradient.clone()


class _ExpireOnReplay(torch.autograd.Function):
    """Identity on a call's outputs whose backward raises if a later call or an in-place operation overwrote them."""

    @staticmethod
    def forward(ctx: Any, calls: list[int], *outputs: Tensor) -> tuple[Tensor, ...]:
        """Return views of the outputs."""
        ctx.calls, ctx.number = calls, calls[0]
        ctx.save_for_backward(*outputs)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradients on unless the outputs have been overwritten."""
        if ctx.calls[0] != ctx.number:
            raise RuntimeError(
                f"cuda_graph: got the backward of a call after {ctx.calls[0] - ctx.number} later ones of its shape, "
                "wanted it before the next call, which overwrites what the backward reads"
            )
        _ = ctx.saved_tensors  # raises if one was changed in place
        return None, *gradients


def expire_on_replay(calls: list[int], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of call number `calls[0]`; their backward raises after a later call."""
    return cast("tuple[Tensor, ...]", _ExpireOnReplay.apply(calls, *outputs))  # type: ignore[no-untyped-call]


def _clone_gradient(tensor: Tensor) -> Tensor:
    return cast(Tensor, _CloneGradient.apply(tensor)) if tensor.requires_grad else tensor  # type: ignore[no-untyped-call]
