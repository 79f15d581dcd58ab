"""CUDA graphs of `refine`, forward and backward: a call of a kind seen before is one launch each way.

A graph reads and writes memory of its own. Maps are copied in; weights and running statistics are used where they lie,
so a module whose parameters have moved is captured anew. What a call returns is overwritten by the next of its kind,
and its backward must come before: it raises otherwise.
What decides which kernels run, the precision of float32 among it, is part of the kind.
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

# Kinds of call kept; beyond it the oldest goes. Each holds the memory of its maps, forward and backward.
KEPT = 8

WEIGHTS = ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")
RUNNING = ("running_mean", "running_var")

Function = Callable[..., tuple[Tensor, ...]]

_capturing = threading.Lock()


class Graphs:
    """The graphs of one module."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[Function, list[int]]] = {}

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        """A copy of the module captures its own."""
        return Graphs, ()

    def refine(self, refine: Callable[..., Refined], x: Tensor, arguments: dict[str, Any]) -> Refined:
        """refine(x, **arguments) by a graph, captured at the first call of its kind.

        Raises:
            ValueError, TypeError: x is not on a GPU, ranks share statistics, or an argument does not fit.
        """
        # Before anything is copied or captured: lengths on the CPU are looked at, and nothing is lost.
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
        key = kind(weights, running, maps, rest)
        if key not in self._captured:
            while len(self._captured) >= KEPT:
                del self._captured[next(iter(self._captured))]
            samples = [v.detach() for v in weights.values()] + [v.detach().clone() for v in maps.values()]
            for sample, v in zip(samples, (*weights.values(), *maps.values()), strict=True):
                sample.requires_grad_(differentiable and v.requires_grad)
            with torch.cuda.device(x.device):
                self._captured[key] = _capture(call, samples, running), [0]
        graphed, calls = self._captured[key]
        calls[0] += 1
        with torch.cuda.device(x.device):
            outputs = graphed(*map(_own, (*weights.values(), *maps.values())))
        features, strips, *last = guarded(calls, outputs)
        return Refined(features, strips, State(*last) if last else None)


def kind(
    weights: dict[str, Tensor], running: list[Tensor], maps: dict[str, Tensor], settings: tuple[Hashable, ...]
) -> Hashable:
    """What a graph is captured for: how its tensors are, which weights they are, and in which state PyTorch is."""
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
    """`call` as a graph, with gradients; what its rehearsals did to the running statistics is undone."""
    before = [tensor.clone() for tensor in running]
    try:
        with torch.autocast("cuda", enabled=False):  # the kernels choose their dtypes themselves
            graphed = make_graphed(call, tuple(samples))
    finally:
        for tensor, value in zip(running, before, strict=True):
            tensor.copy_(value)
    return graphed


def make_graphed(call: Function, samples: tuple[Tensor, ...]) -> Function:
    """torch.cuda.make_graphed_callables whose capture fails on no other thread's calls.

    By default cudaHostAlloc fails in any thread, such as a DataLoader's that pins memory, while a graph is captured.
    """
    make: Any = torch.cuda.make_graphed_callables
    mode = {"capture_error_mode": "thread_local"}
    if "capture_error_mode" in signature(make).parameters:  # newer than torch 2.11
        return cast(Function, make(call, samples, allow_unused_input=True, **mode))
    with _capturing:  # of two threads each would put back what the other has set
        graph: Any = torch.cuda.graph
        torch.cuda.graph = partial(graph, **mode)  # type: ignore[misc,assignment]
        try:
            return cast(Function, make(call, samples, allow_unused_input=True))
        finally:
            torch.cuda.graph = graph  # type: ignore[misc]


class _Own(torch.autograd.Function):
    """The same tensor, with a gradient of its own: the graph's lies where its next replay writes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """The tensor where it lies."""
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """A copy."""
        return gradient.clone()


class _Guarded(torch.autograd.Function):
    """A call's outputs; their backward raises where the next call, or somebody's hand, has overwritten them."""

    @staticmethod
    def forward(ctx: Any, calls: list[int], *outputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs where they lie."""
        ctx.calls, ctx.number = calls, calls[0]
        ctx.save_for_backward(*outputs)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients as they come."""
        if ctx.calls[0] != ctx.number:
            raise RuntimeError(
                f"cuda_graph: got the backward of a call after {ctx.calls[0] - ctx.number} more of its kind, wanted it "
                "before the next: that overwrites what the backward reads"
            )
        _ = ctx.saved_tensors  # raises where one was changed in place
        return None, *gradients


def guarded(calls: list[int], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of call number `calls[0]`, with a backward that knows whether they are still its own."""
    return cast("tuple[Tensor, ...]", _Guarded.apply(calls, *outputs))  # type: ignore[no-untyped-call]


def _own(tensor: Tensor) -> Tensor:
    return cast(Tensor, _Own.apply(tensor)) if tensor.requires_grad else tensor  # type: ignore[no-untyped-call]
