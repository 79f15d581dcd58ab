"""Sections of the unit: training and eval, eager, compiled, graphed and ours; and the table of all sections.

A row's "kernel ms" is the call to be profiled, in place of its time: the profiler slows down what is timed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu import losses
from benchmarks.gpu.implementations import (
    CUDA,
    CUDA_GRAPHED,
    GRAPHED,
    OURS,
    OURS_GRAPHED,
    Autocast,
    autocast,
    graphed,
)
from benchmarks.gpu.run import PRECISIONS, Run, left_out, set_precision, speed_up, times
from benchmarks.harness import measure, roofline
from benchmarks.harness.measure import Fn
from benchmarks.implementations.refine import (
    AUTHORS,
    COMPILED,
    REFERENCE,
    Implementation,
    filter_valid,
    implementations,
)
from benchmarks.reports.table import Row
from rru_fast import reference

FLOAT32, BFLOAT16 = "training, float32", "training, bfloat16 autocast"
COMPILE = ", torch.compile"  # suffix of the titles of sections that compile

Section = Callable[[Run], Iterator[list[Row]]]


def training(run: Run, bfloat16: bool, precisions: Sequence[str], compile: bool = False) -> Iterator[list[Row]]:
    """Yield the rows of training at the paper's shape, at each precision.

    Args:
        run: sizes, device and rounds.
        bfloat16: run under autocast.
        precisions: of float32 products; see `set_precision`.
        compile: measure torch.compile and the implementations it is compared with, forward with backward only: a
            forward alone would be compiled separately.
    """
    shape = run.sizes.maps
    for precision in precisions:
        set_precision(precision, run.device)
        impls = implementations(shape, "float32", run.device, hidden=run.sizes.hidden)
        impls |= graphed(impls, run.device)
        if compile:
            kept = AUTHORS, REFERENCE, OURS, OURS_GRAPHED, CUDA, CUDA_GRAPHED
            impls = {name: impls[name] for name in kept if name in impls}
            impls[COMPILED] = impls[REFERENCE].twin(reference.RRU)
            impls[COMPILED].module.compile()  # in place: the parameters keep their names
        if bfloat16:
            impls = {name: autocast(impl) for name, impl in impls.items()}
        impls, refused = filter_valid(impls, run.sizes.draws)
        forwards = {} if compile else times({name: impl.forward for name, impl in impls.items()}, run)
        steps = times({name: impl.step for name, impl in impls.items()}, run)
        copies = _copies_ms(impls, run)
        dtype = "bfloat16" if bfloat16 else "float32"
        least = {back: roofline.size(shape, dtype, backward=back) / run.copy for back in (False, True)}
        yield [
            {
                "implementation": name,
                "shape": list(shape),
                "precision": precision,
                **_forward_columns(impl, forwards, name, least[False]),
                "fwd+bwd ms": 1e3 * median(steps[name]),
                "fwd+bwd kernel ms": impl.step,
                "copies ms": copies.get(name),
                "x authors": speed_up(steps, AUTHORS, name),
                "x reference": speed_up(steps, REFERENCE, name),
                "x compile": speed_up(steps, COMPILED, name),
                "x triton": speed_up(steps, OURS_GRAPHED if "graphed" in name else OURS, name),
                # One code replays both: it copies maps in and gradients out.
                "x graphed eager": speed_up(steps, GRAPHED, name) if "graphed" in name else None,
                "% of roofline": 100 * least[True] / median(steps[name]),
                "saved MiB": None if "graphed" in name or name == COMPILED else _saved_bytes(impl) / measure.MIB,
                # The memory of a graph is allocated when it is captured.
                "peak MiB": None if "graphed" in name else measure.peak_bytes(impl.step, run.device) / measure.MIB,
            }
            for name, impl in impls.items()
        ] + left_out(refused, shape, precision)


def _forward_columns(impl: Implementation, forwards: Mapping[str, list[float]], name: str, least: float) -> Row:
    if name not in forwards:
        return {}
    return {
        "forward ms": 1e3 * median(forwards[name]),
        "forward kernel ms": impl.forward,
        "x authors, forward": speed_up(forwards, AUTHORS, name),
        "% of roofline, forward": 100 * least / median(forwards[name]),
    }


def tracklet(run: Run, bfloat16: bool, precisions: Sequence[str]) -> Iterator[list[Row]]:
    """Yield the rows of a whole tracklet in eval mode, at each precision.

    Without torch.compile, which unrolls the frames and takes minutes.

    Args:
        run: sizes, device and rounds.
        bfloat16: run under autocast.
        precisions: of float32 products; see `set_precision`.
    """
    shape, dtype = run.sizes.tracklet, "bfloat16" if bfloat16 else "float32"
    for precision in precisions:
        set_precision(precision, run.device)
        impls = implementations(shape, "float32", run.device, training=False, hidden=run.sizes.hidden)
        impls |= graphed(impls, run.device)
        if bfloat16:
            impls = {name: autocast(impl) for name, impl in impls.items()}
        impls, refused = filter_valid(impls, run.sizes.draws)
        seconds = times({name: impl.forward for name, impl in impls.items()}, run)
        copies = _copies_ms(impls, run)
        least = roofline.size(shape, dtype, backward=False) / run.copy
        yield [
            {
                "implementation": name,
                "shape": list(shape),
                "precision": precision,
                "ms": 1e3 * median(seconds[name]),
                "kernel ms": impl.forward,
                "copies ms": copies.get(name),
                "x authors": speed_up(seconds, AUTHORS, name),
                "x reference": speed_up(seconds, REFERENCE, name),
                "x graphed eager": speed_up(seconds, GRAPHED, name) if "graphed" in name else None,
                "% of roofline": 100 * least / median(seconds[name]),
                "peak MiB": None if "graphed" in name else measure.peak_bytes(impl.forward, run.device) / measure.MIB,
            }
            for name, impl in impls.items()
        ] + left_out(refused, shape, precision)


def _copies_ms(impls: Mapping[str, Implementation], run: Run) -> dict[str, float]:
    """Return the milliseconds that the copies alone of each graphed call take."""
    copies = {name: _copies(impl) for name, impl in impls.items() if "graphed" in name}
    return {name: 1e3 * median(seconds) for name, seconds in times(copies, run).items()} if copies else {}


def _copies(impl: Implementation) -> Fn:
    """Return the copies of a graphed call: maps in; in a step also upstream gradients in and leaves' gradients out."""
    incoming, outgoing = [impl.x.detach()], []
    if impl.x.requires_grad:
        dtype = torch.bfloat16 if isinstance(impl, Autocast) else impl.x.dtype
        incoming += [upstream.to(dtype) for upstream in impl.upstream]
        outgoing = [leaf.detach() for leaf in (impl.x, *impl.module.parameters())]
    static = [torch.empty_like(tensor) for tensor in incoming]

    def copy() -> list[Tensor]:
        for to, tensor in zip(static, incoming, strict=True):
            to.copy_(tensor)
        return [tensor.clone() for tensor in outgoing]

    return copy


def _saved_bytes(impl: Implementation) -> int:
    context: AbstractContextManager[object] = nullcontext()
    if isinstance(impl, Autocast):
        context = torch.autocast(impl.x.device.type, torch.bfloat16)
    with context:
        return measure.saved_bytes(lambda: impl.module(impl.x)[:2], [impl.x, *impl.module.parameters()])


# Operator and section by title.
SECTIONS: dict[str, tuple[str, Section]] = {
    FLOAT32: ("refine", partial(training, bfloat16=False, precisions=PRECISIONS)),
    BFLOAT16: ("refine", partial(training, bfloat16=True, precisions=("defaults",))),
    "eval, a tracklet, float32": ("refine", partial(tracklet, bfloat16=False, precisions=PRECISIONS)),
    "eval, a tracklet, bfloat16 autocast": ("refine", partial(tracklet, bfloat16=True, precisions=("defaults",))),
    "L_v + L_p, forward + backward": ("batch_hard", losses.strip_losses),
    "many features, forward + backward": ("batch_hard", losses.many),
    "features against a gallery, cosine, forward + backward": ("batch_hard", losses.gallery),
    "forward + backward": ("strip_pool", losses.strips),
    f"{FLOAT32}{COMPILE}": ("refine", partial(training, bfloat16=False, precisions=("high", "defaults"), compile=True)),
    f"{BFLOAT16}{COMPILE}": ("refine", partial(training, bfloat16=True, precisions=("defaults",), compile=True)),
}
