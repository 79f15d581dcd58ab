"""Sections of the unit: training and eval, eager, compiled, graphed and ours; and the table of all sections.

A row's "kernel ms" is the call to be profiled, in place of its time: the profiler slows down what is timed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

import rru_fast
from benchmarks.gpu import losses
from benchmarks.gpu.run import PRECISIONS, Run, Work, faster, left_out, set_precision, times
from benchmarks.harness import measure, roofline
from benchmarks.implementations import refine as contenders
from benchmarks.implementations.refine import AUTHORS, COMPILED, REFERENCE, Contender
from benchmarks.reports.table import Row
from rru_fast import reference
from rru_fast.testing import gradients

GRAPHED = "eager, graphed"
OURS, OURS_GRAPHED = "triton", "triton, graphed"
FLOAT32, BFLOAT16 = "training, float32", "training, bfloat16 autocast"
COMPILE = ", torch.compile"  # end of the titles of sections that compile

Section = Callable[[Run], Iterator[list[Row]]]


@dataclass(frozen=True)
class Autocast(Contender):
    """A contender on 16-bit maps with float32 weights."""

    def forward(self) -> rru_fast.Refined:
        """As any contender's, under autocast."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            return super().forward()

    def step(self) -> tuple[Tensor, ...]:
        """As any contender's, the forward under autocast."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            out = self.module(self.x)
        upstream = tuple(u.to(o.dtype) for u, o in zip(self.upstream, out[:2], strict=True))
        return torch.autograd.grad(out[:2], [self.x, *self.module.parameters()], upstream)

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients, for parity."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            features, strips, _ = self.module(self.x)
        outputs = [features, strips]
        upstream = [u.to(o.dtype) for u, o in zip(self.upstream, outputs, strict=True)]
        found = gradients(outputs, upstream, {"x": self.x, **dict(self.module.named_parameters())})
        return {"features": features.detach(), "strips": strips.detach(), **found}


class GraphedReference(rru_fast.RRU):
    """The reference's own operations, captured as the fast module's are."""

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        super()._choose_backend("composite", True)
        self.backend = "reference"


def autocast(own: Contender) -> Autocast:
    """The same contender with its maps in bfloat16."""
    return Autocast(own.module, own.x.detach().to(torch.bfloat16).requires_grad_(), own.upstream)


def training(run: Run, bfloat16: bool, precisions: Sequence[str], compile: bool = False) -> Iterator[list[Row]]:
    """Rows of training at the paper's shape, at each precision.

    compile: the compiler and those it is compared with, forward and backward only: a forward alone compiles anew.
    """
    shape = run.sizes.maps
    for precision in precisions:
        set_precision(precision, run.device)
        field = contenders.contenders(shape, "float32", run.device, hidden=run.sizes.hidden)
        field |= _others(field, run.device)
        if compile:
            field = {name: own for name, own in field.items() if name in (AUTHORS, REFERENCE, OURS, OURS_GRAPHED)}
            field[COMPILED] = field[REFERENCE].twin(reference.RRU)
            field[COMPILED].module.compile()  # in place: the parameters keep their names
        if bfloat16:
            field = {name: autocast(own) for name, own in field.items()}
        field, refused = contenders.sifted(field, run.sizes.draws)
        forwards = {} if compile else times({name: own.forward for name, own in field.items()}, run)
        steps = times({name: own.step for name, own in field.items()}, run)
        copies = _copies_ms(field, run)
        dtype = "bfloat16" if bfloat16 else "float32"
        least = {back: roofline.size(shape, dtype, backward=back) / run.copy for back in (False, True)}
        yield [
            {
                "implementation": name,
                "shape": list(shape),
                "precision": precision,
                **_forward_columns(own, forwards, name, least[False], run),
                "fwd+bwd ms": 1e3 * median(steps[name]),
                "fwd+bwd kernel ms": own.step,
                "copies ms": copies.get(name),
                "x authors": faster(steps, AUTHORS, name),
                "x reference": faster(steps, REFERENCE, name),
                "x compile": faster(steps, COMPILED, name),
                # Both are replayed by the same code, which copies maps in and gradients out.
                "x graphed eager": faster(steps, GRAPHED, name) if "graphed" in name else None,
                "% of roofline": 100 * least[True] / median(steps[name]),
                "saved MiB": None if "graphed" in name or name == COMPILED else _saved(own) / measure.MIB,
                # A graph's memory is taken when it is captured.
                "peak MiB": None if "graphed" in name else measure.peak_bytes(own.step, run.device) / measure.MIB,
            }
            for name, own in field.items()
        ] + left_out(refused, shape, precision)


def _forward_columns(own: Contender, forwards: Mapping[str, list[float]], name: str, least: float, run: Run) -> Row:
    if name not in forwards:
        return {}
    return {
        "forward ms": 1e3 * median(forwards[name]),
        "forward kernel ms": own.forward,
        "x authors, forward": faster(forwards, AUTHORS, name),
        "% of roofline, forward": 100 * least / median(forwards[name]),
    }


def tracklet(run: Run) -> Iterator[list[Row]]:
    """Rows of a whole tracklet in eval, at each precision; unrolled over its frames, it would compile for minutes."""
    shape = run.sizes.tracklet
    for precision in PRECISIONS:
        set_precision(precision, run.device)
        field = contenders.contenders(shape, "float32", run.device, training=False, hidden=run.sizes.hidden)
        field |= _others(field, run.device)
        field, refused = contenders.sifted(field, run.sizes.draws)
        seconds = times({name: own.forward for name, own in field.items()}, run)
        copies = _copies_ms(field, run)
        least = roofline.size(shape, "float32", backward=False) / run.copy
        yield [
            {
                "implementation": name,
                "shape": list(shape),
                "precision": precision,
                "ms": 1e3 * median(seconds[name]),
                "kernel ms": own.forward,
                "copies ms": copies.get(name),
                "x authors": faster(seconds, AUTHORS, name),
                "x reference": faster(seconds, REFERENCE, name),
                "x graphed eager": faster(seconds, GRAPHED, name) if "graphed" in name else None,
                "% of roofline": 100 * least / median(seconds[name]),
                "peak MiB": None if "graphed" in name else measure.peak_bytes(own.forward, run.device) / measure.MIB,
            }
            for name, own in field.items()
        ] + left_out(refused, shape, precision)


def _others(field: Mapping[str, Contender], device: torch.device) -> dict[str, Contender]:
    """The reference graphed, and ours graphed; on a GPU only."""
    if device.type != "cuda":
        return {}
    eager = field[REFERENCE]
    return {
        GRAPHED: eager.twin(GraphedReference),
        OURS_GRAPHED: eager.twin(rru_fast.RRU, backend="triton", cuda_graph=True),
    }


def _copies_ms(field: Mapping[str, Contender], run: Run) -> dict[str, float]:
    """Milliseconds of the copies alone of each graphed contender's call."""
    copies = {name: _copies(own) for name, own in field.items() if "graphed" in name}
    return {name: 1e3 * median(seconds) for name, seconds in times(copies, run).items()} if copies else {}


def _copies(own: Contender) -> Work:
    """The copies alone of a graphed call: maps in; of a step also upstream gradients in, every leaf's gradient out."""
    incoming, outgoing = [own.x.detach()], []
    if own.x.requires_grad:
        dtype = torch.bfloat16 if isinstance(own, Autocast) else own.x.dtype
        incoming += [upstream.to(dtype) for upstream in own.upstream]
        outgoing = [leaf.detach() for leaf in (own.x, *own.module.parameters())]
    static = [torch.empty_like(tensor) for tensor in incoming]

    def copy() -> list[Tensor]:
        for to, tensor in zip(static, incoming, strict=True):
            to.copy_(tensor)
        return [tensor.clone() for tensor in outgoing]

    return copy


def _saved(contender: Contender) -> int:
    context: AbstractContextManager[object] = nullcontext()
    if isinstance(contender, Autocast):
        context = torch.autocast(contender.x.device.type, torch.bfloat16)
    with context:
        known = [contender.x, *contender.module.parameters()]
        return measure.saved_bytes(lambda: contender.module(contender.x)[:2], known)


# By title: the operator, and its section.
SECTIONS: dict[str, tuple[str, Section]] = {
    FLOAT32: ("refine", partial(training, bfloat16=False, precisions=PRECISIONS)),
    BFLOAT16: ("refine", partial(training, bfloat16=True, precisions=("defaults",))),
    "eval, a tracklet, float32": ("refine", tracklet),
    "L_v + L_p, forward + backward": ("batch_hard", losses.strip_losses),
    "many features, forward + backward": ("batch_hard", losses.many),
    "forward + backward": ("strip_pool", losses.strips),
    f"{FLOAT32}{COMPILE}": ("refine", partial(training, bfloat16=False, precisions=("high", "defaults"), compile=True)),
    f"{BFLOAT16}{COMPILE}": ("refine", partial(training, bfloat16=True, precisions=("defaults",), compile=True)),
}
