"""What `benchmarks.gpu` measures, a section a function: each makes its rows from one `Run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

import rru_fast
from benchmarks import contenders, measure, parity, roofline
from benchmarks.contenders import AUTHORS, COMPILED, REFERENCE, Contender, Shape
from benchmarks.table import Row
from rru_fast import config, reference

GRAPHED = "eager, graphed"
WHY = "left out"
MARGIN = 0.4


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    maps: Shape = (20, 8, 2048, 8, 8)
    tracklet: Shape = (1, 675, 2048, 8, 8)
    features: tuple[int, int, int] = (8, 20, 2048)  # strips, clips, channels
    clips_a_person: int = 4
    many: tuple[int, int] = (16384, 256)
    calls: int = 5  # in a row, for a time


TOY = Sizes((2, 2, 24, 3, 2), (1, 3, 24, 3, 2), (2, 8, 40), 2, (40, 16), 1)
Work = Callable[[], object]


@dataclass(frozen=True)
class Run:
    """What every section is given."""

    sizes: Sizes
    device: torch.device
    copy: float  # bytes/s of the device's own copy
    repeats: int  # rounds; each runs every implementation once
    warmup: int


Section = Callable[[Run], list[Row]]


@dataclass(frozen=True)
class Autocast(Contender):
    """A contender on 16-bit maps beside float32 weights."""

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
        """What parity compares."""
        with torch.autocast(self.x.device.type, torch.bfloat16):
            features, strips, _ = self.module(self.x)
        leaves = {"x": self.x, **dict(self.module.named_parameters())}
        outputs = [features, strips]
        upstream = [u.to(o.dtype) for u, o in zip(self.upstream, outputs, strict=True)]
        return parity.gradients(outputs, upstream, leaves)


def _training(run: Run, autocast: torch.dtype | None) -> list[Row]:
    shape = run.sizes.maps
    field = contenders.contenders(shape, "float32", run.device)
    field |= _others(field, run.device)
    if autocast is not None:
        field = {
            name: Autocast(own.module, own.x.detach().to(autocast).requires_grad_(), own.upstream)
            for name, own in field.items()
        }
    field, refused = contenders.sifted(field)
    forwards = _times({name: own.forward for name, own in field.items()}, run)
    steps = _times({name: own.step for name, own in field.items()}, run)
    dtype = "float32" if autocast is None else "bfloat16"
    least = {back: roofline.size(shape, dtype, backward=back) / run.copy for back in (False, True)}
    return [
        {
            "implementation": name,
            "shape": list(shape),
            "forward ms": 1e3 * median(forwards[name]),
            "x authors, forward": _faster(forwards, AUTHORS, name),
            "% of roofline, forward": 100 * least[False] / median(forwards[name]),
            "fwd+bwd ms": 1e3 * median(steps[name]),
            "x authors": _faster(steps, AUTHORS, name),
            "x reference": _faster(steps, REFERENCE, name),
            "x compile": _faster(steps, COMPILED, name),
            # Both are replayed by the same code, which copies maps in and gradients out.
            "x graphed eager": _faster(steps, GRAPHED, name) if "graphed" in name else None,
            "% of roofline": 100 * least[True] / median(steps[name]),
            "saved MiB": None if "graphed" in name or name == COMPILED else _saved(own) / measure.MIB,
            # A graph's memory is taken when it is captured.
            "peak MiB": None if "graphed" in name else measure.peak_bytes(own.step, run.device) / measure.MIB,
        }
        for name, own in field.items()
    ] + _left_out(refused, shape)


def _tracklet(run: Run) -> list[Row]:
    shape = run.sizes.tracklet
    field = contenders.contenders(shape, "float32", run.device, training=False)
    field |= _others(field, run.device, compile=False)  # unrolled over the frames, it would compile for many minutes
    field, refused = contenders.sifted(field)
    times = _times({name: own.forward for name, own in field.items()}, run)
    least = roofline.size(shape, "float32", backward=False) / run.copy
    return [
        {
            "implementation": name,
            "shape": list(shape),
            "ms": 1e3 * median(times[name]),
            "x authors": _faster(times, AUTHORS, name),
            "x reference": _faster(times, REFERENCE, name),
            "x graphed eager": _faster(times, GRAPHED, name) if "graphed" in name else None,
            "% of roofline": 100 * least / median(times[name]),
            "peak MiB": None if "graphed" in name else measure.peak_bytes(own.forward, run.device) / measure.MIB,
        }
        for name, own in field.items()
    ] + _left_out(refused, shape)


def _left_out(refused: Mapping[str, str], shape: Sequence[int]) -> list[Row]:
    """Rows without figures: what does not run, or is not within parity, and why."""
    return [{"implementation": name, "shape": list(shape), WHY: why} for name, why in refused.items()]


def _faster(times: Mapping[str, list[float]], baseline: str, name: str) -> float | None:
    """How many times faster than the baseline; None where that was left out."""
    return measure.ratio(times[baseline], times[name]) if baseline in times else None


def _others(field: Mapping[str, Contender], device: torch.device, compile: bool = True) -> dict[str, Contender]:
    """torch.compile of the reference, the reference graphed, and ours graphed; on a GPU only."""
    if device.type != "cuda":
        return {}
    eager = field[REFERENCE]
    found: dict[str, Contender] = {}
    if compile:
        found[COMPILED] = eager.twin(reference.RRU)
        found[COMPILED].module.compile()  # in place: the parameters keep their names
    found[GRAPHED] = eager.twin(GraphedReference)
    found["triton, graphed"] = eager.twin(rru_fast.RRU, backend="triton", cuda_graph=True)
    return found


class GraphedReference(rru_fast.RRU):
    """The reference's own operations, captured as the fast module's are."""

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        super()._choose_backend("composite", True)
        self.backend = "reference"


def _losses(run: Run) -> list[Row]:
    groups, clips, channels = run.sizes.features
    labels = torch.arange(clips, device=run.device) // run.sizes.clips_a_person
    strips = torch.randn(groups, clips, channels, device=run.device)
    video = strips.mean(0)

    def loss(triplet: Any, one_by_one: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def value(video: Tensor, strips: Tensor) -> Tensor:
            of_strips: Tensor = (
                torch.stack([triplet(strip, labels) for strip in strips]).mean()
                if one_by_one
                else triplet(strips, labels)
            )
            return of_strips + cast(Tensor, triplet(video, labels))

        return value

    _, *backends = config.serving(run.device)
    losses = {"eager": loss(reference.BatchHardTripletLoss(MARGIN), True)}
    losses |= {name: loss(rru_fast.BatchHardTripletLoss(MARGIN, backend=name), False) for name in backends}
    return _compared(losses, {"video": video, "strips": strips}, run, list(run.sizes.features))


def _many(run: Run) -> list[Row]:
    n, d = run.sizes.many
    labels = torch.arange(n, device=run.device) // run.sizes.clips_a_person
    _, *backends = config.serving(run.device)
    modules = {"eager": reference.BatchHardTripletLoss(MARGIN)}
    modules |= {name: rru_fast.BatchHardTripletLoss(MARGIN, backend=name) for name in backends}
    losses = {name: lambda features, module=module: module(features, labels) for name, module in modules.items()}
    return _compared(losses, {"features": torch.randn(n, d, device=run.device)}, run, [n, d])


def _strips(run: Run) -> list[Row]:
    s = torch.randn(run.sizes.maps, device=run.device)
    backends = {"eager" if name == "reference" else name: name for name in config.serving(run.device)}
    works = {name: lambda s, b=backend: rru_fast.strip_pool(s, backend=b) for name, backend in backends.items()}
    return _compared(works, {"s": s}, run, list(run.sizes.maps), 2 * s.nbytes / run.copy)


def _compared(
    functions: Mapping[str, Callable[..., Tensor]],
    inputs: Mapping[str, Tensor],
    run: Run,
    shape: list[int],
    least: float | None = None,
) -> list[Row]:
    """Rows of forward with backward of functions of the same inputs, each held to "eager" in float64."""

    def results(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        leaves = {name: v.to(dtype).detach().requires_grad_() for name, v in inputs.items()}
        out = function(*leaves.values())
        return parity.gradients([out], [torch.ones_like(out)], leaves)

    in_dtype, oracle = results(functions["eager"]), results(functions["eager"], torch.float64)
    works: dict[str, Work] = {}
    refused: dict[str, str] = {}
    for name, function in functions.items():
        try:
            parity.demand(name, results(function), in_dtype, oracle)
        except SystemExit as refusal:
            refused[name] = str(refusal)
        except Exception as error:  # whatever it is, the others can be measured
            refused[name] = f"does not run: {contenders.told(error)}"
        else:
            works[name] = partial(results, function)
    times = _times(works, run)
    return [
        {
            "implementation": name,
            "shape": shape,
            "ms": 1e3 * median(times[name]),
            "x eager": _faster(times, "eager", name),
            **({} if least is None else {"% of roofline": 100 * least / median(times[name])}),
            "peak MiB": measure.peak_bytes(work, run.device) / measure.MIB,
        }
        for name, work in works.items()
    ] + _left_out(refused, shape)


def _times(works: Mapping[str, Work], run: Run) -> dict[str, list[float]]:
    """Seconds of one call, the mean of a few in a row, in each round."""
    calls = run.sizes.calls

    def in_a_row(work: Work) -> None:
        for _ in range(calls):
            work()

    runs = {name: partial(in_a_row, work) for name, work in works.items()}
    totals = measure.paired(runs, run.repeats, run.warmup)
    return {name: [total / calls for total in of_name] for name, of_name in totals.items()}


def _saved(contender: Contender) -> int:
    context: AbstractContextManager[object] = nullcontext()
    if isinstance(contender, Autocast):
        context = torch.autocast(contender.x.device.type, torch.bfloat16)
    with context:
        known = [contender.x, *contender.module.parameters()]
        return measure.saved_bytes(lambda: contender.module(contender.x)[:2], known)


# By title: the operator, and what measures it.
SECTIONS: dict[str, tuple[str, Section]] = {
    "training, float32": ("refine", partial(_training, autocast=None)),
    "training, bfloat16 autocast": ("refine", partial(_training, autocast=torch.bfloat16)),
    "eval, a tracklet, float32": ("refine", _tracklet),
    "L_v + L_p, forward + backward": ("batch_hard", _losses),
    "many features, forward + backward": ("batch_hard", _many),
    "forward + backward": ("strip_pool", _strips),
}
