"""Sections of the loss and of strip pooling: forward with backward of functions of the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

import rru_fast
from benchmarks.gpu.run import PRECISIONS, Run, Sizes, left_out, set_precision, speed_up, times
from benchmarks.harness import measure
from benchmarks.harness.measure import Fn
from benchmarks.harness.parity import format_error, report_parity
from benchmarks.reports.table import Row
from rru_fast import backends, reference
from rru_fast.testing import compare, gradients

MARGIN = 0.4
EAGER = "eager"
Function = Callable[..., Tensor]


def strip_losses(run: Run) -> Iterator[list[Row]]:
    """Yield the rows of L_v + L_p, the loss of the pooled features and of every strip, at each precision."""
    inputs = strip_loss_inputs(run.sizes, run.device)
    for precision in PRECISIONS:
        set_precision(precision, run.device)
        functions = strip_loss_functions(run.sizes, run.device, _backends(run.device))
        yield _rows(functions, inputs, run, run.sizes.features, precision)


def strip_loss_inputs(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return random features of strips (G, N, D), and of the clips (N, D), their mean."""
    strips = torch.randn(sizes.features, device=device)
    return {"video": strips.mean(0), "strips": strips}


def strip_loss_functions(sizes: Sizes, device: torch.device, backends: Sequence[str]) -> dict[str, Function]:
    """Return L_v + L_p by each implementation; eager PyTorch takes the strips one by one."""
    labels = torch.arange(sizes.features[1], device=device) // sizes.clips_per_identity

    def loss(triplet: Any, one_by_one: bool) -> Function:
        def value(video: Tensor, strips: Tensor) -> Tensor:
            of_strips: Tensor = (
                torch.stack([triplet(strip, labels) for strip in strips]).mean()
                if one_by_one
                else triplet(strips, labels)
            )
            return of_strips + cast(Tensor, triplet(video, labels))

        return value

    losses = {EAGER: loss(reference.BatchHardTripletLoss(MARGIN), True)}
    return losses | {name: loss(rru_fast.BatchHardTripletLoss(MARGIN, backend=name), False) for name in backends}


def many(run: Run) -> Iterator[list[Row]]:
    """Yield the rows of the loss of many features in one group, at each precision."""
    inputs = {"features": torch.randn(run.sizes.many, device=run.device)}
    for precision in PRECISIONS:
        set_precision(precision, run.device)
        functions = many_functions(run.sizes, run.device, _backends(run.device))
        yield _rows(functions, inputs, run, run.sizes.many, precision)


def many_functions(sizes: Sizes, device: torch.device, backends: Sequence[str]) -> dict[str, Function]:
    """Return the loss by each implementation."""
    labels = torch.arange(sizes.many[0], device=device) // sizes.clips_per_identity
    modules = {EAGER: reference.BatchHardTripletLoss(MARGIN)}
    modules |= {name: rru_fast.BatchHardTripletLoss(MARGIN, backend=name) for name in backends}
    return {name: lambda features, module=module: module(features, labels) for name, module in modules.items()}


def gallery(run: Run) -> Iterator[list[Row]]:
    """Yield the rows of the loss of features mined in a gallery by cosine distances, at each precision."""
    shapes = gallery_shapes(run.sizes)
    inputs = {name: torch.randn(shape, device=run.device) for name, shape in shapes.items()}
    for precision in PRECISIONS:
        set_precision(precision, run.device)
        functions = gallery_functions(run.sizes, run.device, _backends(run.device))
        yield _rows(functions, inputs, run, [*shapes["features"], *shapes["gallery"]], precision)


def gallery_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return the shapes of features (N, D) and gallery (M, D)."""
    return {"features": (sizes.queries, sizes.many[1]), "gallery": sizes.many}


def gallery_functions(sizes: Sizes, device: torch.device, backends: Sequence[str]) -> dict[str, Function]:
    """Return the loss of features and gallery by each implementation."""
    labels = torch.arange(sizes.many[0], device=device) // sizes.clips_per_identity

    def loss(backend: str) -> Function:
        options: dict[str, Any] = {"gallery_labels": labels, "margin": MARGIN, "metric": "cosine", "backend": backend}

        def value(features: Tensor, gallery: Tensor) -> Tensor:
            found = rru_fast.batch_hard_triplet(features, labels[: len(features)], gallery=gallery, **options)
            return cast(Tensor, found)

        return value

    return {EAGER: loss("reference")} | {name: loss(name) for name in backends}


def strips(run: Run) -> Iterator[list[Row]]:
    """Yield the rows of strip pooling at one precision: it has no products."""
    set_precision("defaults", run.device)
    s = torch.randn(run.sizes.maps, device=run.device)
    functions: dict[str, Function] = {EAGER: partial(rru_fast.strip_pool, backend="reference")}
    functions |= {name: partial(rru_fast.strip_pool, backend=name) for name in _backends(run.device)}
    yield _rows(functions, {"s": s}, run, run.sizes.maps, "defaults", 2 * s.nbytes / run.copy)


def results(function: Function, inputs: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the value of a function and the gradients of its inputs, computed in `dtype`."""
    leaves = {name: v.to(dtype).detach().requires_grad_() for name, v in inputs.items()}
    out = function(*leaves.values())
    return {"value": out.detach(), **gradients([out], [torch.ones_like(out)], leaves)}


def _backends(device: torch.device) -> list[str]:
    return [name for name in backends.serving(device, "batch_hard") if name != "reference"]


def _rows(
    functions: Mapping[str, Function],
    inputs: Mapping[str, Tensor],
    run: Run,
    shape: Sequence[int],
    precision: str,
    least: float | None = None,
) -> list[Row]:
    """Return the rows of functions of the same inputs, each held to eager in float64 before it is timed.

    least: lower bound of the time in seconds, if the rows have a roofline.
    """
    # A loss is one number, the rounding of which in a single draw is chance; maps are large enough.
    more = range(run.sizes.draws - 1 if least is None else 0)
    drawn = [inputs, *({name: torch.randn_like(v) for name, v in inputs.items()} for _ in more)]
    eager = [(results(functions[EAGER], draw), results(functions[EAGER], draw, torch.float64)) for draw in drawn]
    fns: dict[str, Fn] = {}
    refused: dict[str, str] = {}
    for name, function in functions.items():
        try:
            draws = zip(drawn, eager, strict=True)
            report_parity(name, [compare(results(function, draw), *in_both) for draw, in_both in draws])
        except SystemExit as refusal:
            refused[name] = str(refusal)
        except Exception as error:  # any error: the others can still be measured
            refused[name] = f"does not run: {format_error(error)}"
        else:
            fns[name] = partial(results, function, inputs)
    seconds = times(fns, run)
    return [
        {
            "implementation": name,
            "shape": list(shape),
            "precision": precision,
            "ms": 1e3 * median(seconds[name]),
            "kernel ms": fn,
            "x eager": speed_up(seconds, EAGER, name),
            **({} if least is None else {"% of roofline": 100 * least / median(seconds[name])}),
            "peak MiB": measure.peak_bytes(fn, run.device) / measure.MIB,
        }
        for name, fn in fns.items()
    ] + left_out(refused, shape, precision)
