"""Everything there is to know on a GPU: parity, then speed and memory, printed and kept as it goes.

    python -m benchmarks.gpu
    TRITON_INTERPRET=1 python -m benchmarks.gpu --toy        # whether it runs, where there is no GPU

Float32 is multiplied in TF32, here and in eager; "autocast" is bfloat16 maps beside float32 weights, as a backbone
under autocast leaves them. Graphed rows replay CUDA graphs. What is not within parity, and sections that do not fit in
the time, are left out and named. Roofline: the compulsory bytes at the rate of this GPU's own copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import tyro
from torch import Tensor

import rru_fast
from benchmarks import contenders, measure, parity, roofline, table
from benchmarks.contenders import AUTHORS, COMPILED, REFERENCE, Contender, Shape
from benchmarks.table import Row
from rru_fast import config, reference

GRAPHED = "eager, graphed"
MARGIN = 0.4


@dataclass
class Options:
    """What to measure."""

    toy: bool = False
    """Small shapes on the CPU, once: whether it runs."""
    seconds: float = 480
    """No section begins after this long."""
    repeats: int = 15
    """Rounds; each runs every implementation once."""
    results: Path = Path(__file__).resolve().parent / "results"
    """The folder that gets <gpu>-<date>.json and .md."""


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    maps: Shape = (20, 8, 2048, 8, 8)
    tracklet: Shape = (1, 675, 2048, 8, 8)
    features: tuple[int, int, int] = (8, 20, 2048)  # strips, clips, channels
    clips_a_person: int = 4
    many: tuple[int, int] = (16384, 256)
    calls: int = 5  # in a row, for a time


TOY = Sizes((3, 3, 96, 4, 4), (1, 4, 96, 4, 4), (2, 8, 40), 2, (40, 16), 1)
Work = Callable[[], object]


def main(options: Options) -> list[Row]:
    """Check, measure, print and write, a section at a time; returns the rows."""
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("--toy: got False without a GPU, wanted one, or --toy with TRITON_INTERPRET=1")
    device = torch.device("cpu" if options.toy else "cuda")
    if "triton" not in config.serving(device):
        raise SystemExit(f"triton: got a backend that does not serve: {config.BACKENDS['triton']}")
    sizes = TOY if options.toy else Sizes()
    torch.set_float32_matmul_precision("high")
    begin = time.monotonic()
    copy = measure.copy_rate(64 * measure.MIB if options.toy else 1024 * measure.MIB, device)
    environment = measure.environment(device) | {"op": "gpu", "roofline": f"{copy / 1e9:.0f} GB/s", "left out": []}
    name = "toy" if options.toy else torch.cuda.get_device_name().lower().replace(" ", "-")
    path = options.results / f"{name}-{date.today().isoformat()}.json"
    rows: list[Row] = []
    for title, section in _sections(sizes, device, options, copy).items():
        if time.monotonic() - begin > options.seconds:
            environment["left out"].append(title)
            print(f"{title}: left out, {options.seconds:.0f} s are over")
            continue
        found = [{"implementation": row.pop("implementation"), "mode": title, **row} for row in section()]
        rows += found
        table.show(title, environment, found, hide=table.SHARED)
        measure.write(path, environment, rows)
        path.with_suffix(".md").write_text(_markdown(environment, rows))
        print(f"{time.monotonic() - begin:.0f} s; {path}")
    return rows


def _sections(sizes: Sizes, device: torch.device, options: Options, copy: float) -> dict[str, Callable[[], list[Row]]]:
    return {
        "training, float32": lambda: _training(sizes, device, options, copy, None),
        "training, bfloat16 autocast": lambda: _training(sizes, device, options, copy, torch.bfloat16),
        "eval, a tracklet, float32": lambda: _tracklet(sizes, device, options, copy),
        "L_v + L_p, forward + backward": lambda: _losses(sizes, device, options),
        "batch-hard, many features, forward + backward": lambda: _many(sizes, device, options),
        "strip_pool, forward + backward": lambda: _strips(sizes, device, options, copy),
    }


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


def _training(
    sizes: Sizes, device: torch.device, options: Options, copy: float, autocast: torch.dtype | None
) -> list[Row]:
    field = contenders.contenders(sizes.maps, "float32", device)
    if autocast is not None:
        field = {
            name: Autocast(own.module, own.x.detach().to(autocast).requires_grad_(), own.upstream)
            for name, own in field.items()
        }
    field = contenders.passing(field)
    field |= _others(field, device)
    forwards = _times({name: own.forward for name, own in field.items()}, sizes, options)
    steps = _times({name: own.step for name, own in field.items()}, sizes, options)
    dtype = "float32" if autocast is None else "bfloat16"
    least = {back: roofline.size(sizes.maps, dtype, backward=back) / copy for back in (False, True)}
    return [
        {
            "implementation": name,
            "shape": list(sizes.maps),
            "forward ms": 1e3 * median(forwards[name]),
            "x authors, forward": measure.ratio(forwards[AUTHORS], forwards[name]),
            "% of roofline, forward": 100 * least[False] / median(forwards[name]),
            "fwd+bwd ms": 1e3 * median(steps[name]),
            "x authors": measure.ratio(steps[AUTHORS], steps[name]),
            "x reference": measure.ratio(steps[REFERENCE], steps[name]),
            "x compile": measure.ratio(steps[COMPILED], steps[name]) if COMPILED in steps else None,
            "x graphed eager": measure.ratio(steps[GRAPHED], steps[name]) if GRAPHED in steps else None,
            "% of roofline": 100 * least[True] / median(steps[name]),
            "saved MiB": None if "graphed" in name or name == COMPILED else _saved(own) / measure.MIB,
            # A graph's memory is taken when it is captured.
            "peak MiB": None if "graphed" in name else measure.peak_bytes(own.step) / measure.MIB,
        }
        for name, own in field.items()
    ]


def _tracklet(sizes: Sizes, device: torch.device, options: Options, copy: float) -> list[Row]:
    field = contenders.contenders(sizes.tracklet, "float32", device, training=False)
    field = contenders.passing(field)
    field |= _others(field, device, compile=False)  # unrolled over the frames, it would compile for many minutes
    times = _times({name: own.forward for name, own in field.items()}, sizes, options)
    least = roofline.size(sizes.tracklet, "float32", backward=False) / copy
    return [
        {
            "implementation": name,
            "shape": list(sizes.tracklet),
            "ms": 1e3 * median(times[name]),
            "x authors": measure.ratio(times[AUTHORS], times[name]),
            "x reference": measure.ratio(times[REFERENCE], times[name]),
            "% of roofline": 100 * least / median(times[name]),
            "peak MiB": None if "graphed" in name else measure.peak_bytes(own.forward) / measure.MIB,
        }
        for name, own in field.items()
    ]


def _others(field: Mapping[str, Contender], device: torch.device, compile: bool = True) -> dict[str, Contender]:
    """torch.compile of the reference, the reference graphed, and ours graphed; on a GPU only."""
    if device.type != "cuda":
        return {}
    eager = field[REFERENCE]
    found: dict[str, Contender] = {}
    if compile:
        torch.compiler.reset()
        compiled = eager.twin(reference.RRU)
        found[COMPILED] = replace(compiled, module=torch.compile(compiled.module))  # type: ignore[arg-type]
    found[GRAPHED] = replace(eager.twin(GraphedReference))
    found["triton, graphed"] = eager.twin(rru_fast.RRU, backend="triton", cuda_graph=True)
    return found


class GraphedReference(rru_fast.RRU):
    """The reference's own operations, captured as the fast module's are."""

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        super()._choose_backend("composite", True)
        self.backend = "reference"


def _losses(sizes: Sizes, device: torch.device, options: Options) -> list[Row]:
    groups, clips, channels = sizes.features
    labels = torch.arange(clips, device=device) // sizes.clips_a_person
    strips = torch.randn(groups, clips, channels, device=device)
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

    _, *backends = config.serving(device)
    losses = {"eager": loss(reference.BatchHardTripletLoss(MARGIN), True)}
    losses |= {name: loss(rru_fast.BatchHardTripletLoss(MARGIN, backend=name), False) for name in backends}
    return _compared(losses, {"video": video, "strips": strips}, sizes, options, "eager", list(sizes.features))


def _many(sizes: Sizes, device: torch.device, options: Options) -> list[Row]:
    n, d = sizes.many
    labels = torch.arange(n, device=device) // sizes.clips_a_person
    _, *backends = config.serving(device)
    modules = {"eager": reference.BatchHardTripletLoss(MARGIN)}
    modules |= {name: rru_fast.BatchHardTripletLoss(MARGIN, backend=name) for name in backends}
    losses = {name: lambda features, module=module: module(features, labels) for name, module in modules.items()}
    return _compared(losses, {"features": torch.randn(n, d, device=device)}, sizes, options, "eager", [n, d])


def _strips(sizes: Sizes, device: torch.device, options: Options, copy: float) -> list[Row]:
    s = torch.randn(sizes.maps, device=device)
    backends = {"eager" if name == "reference" else name: name for name in config.serving(device)}
    works = {name: lambda s, b=backend: rru_fast.strip_pool(s, backend=b) for name, backend in backends.items()}
    return _compared(works, {"s": s}, sizes, options, "eager", list(sizes.maps), 2 * s.nbytes / copy)


def _compared(
    functions: Mapping[str, Callable[..., Tensor]],
    inputs: Mapping[str, Tensor],
    sizes: Sizes,
    options: Options,
    baseline: str,
    shape: list[int],
    least: float | None = None,
) -> list[Row]:
    """Rows of forward with backward of functions of the same inputs, each held to the first in float64."""

    def results(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        leaves = {name: v.to(dtype).detach().requires_grad_() for name, v in inputs.items()}
        out = function(*leaves.values())
        return parity.gradients([out], [torch.ones_like(out)], leaves)

    in_dtype, oracle = results(functions[baseline]), results(functions[baseline], torch.float64)
    works: dict[str, Work] = {}
    for name, function in functions.items():
        try:
            parity.demand(name, results(function), in_dtype, oracle)
        except SystemExit as refusal:
            print(refusal)
        else:
            works[name] = partial(results, function)
    times = _times(works, sizes, options)
    return [
        {
            "implementation": name,
            "shape": shape,
            "ms": 1e3 * median(times[name]),
            "x eager": measure.ratio(times[baseline], times[name]),
            **({} if least is None else {"% of roofline": 100 * least / median(times[name])}),
            "peak MiB": measure.peak_bytes(work) / measure.MIB,
        }
        for name, work in works.items()
    ]


def _times(works: Mapping[str, Work], sizes: Sizes, options: Options) -> dict[str, list[float]]:
    """Seconds of one call, the mean of a few in a row, in each round."""

    def in_a_row(work: Work) -> None:
        for _ in range(sizes.calls):
            work()

    runs = {name: partial(in_a_row, work) for name, work in works.items()}
    return {
        name: [total / sizes.calls for total in totals]
        for name, totals in measure.paired(runs, *((1, 0) if options.toy else (options.repeats, 2))).items()
    }


def _saved(contender: Contender) -> int:
    context: AbstractContextManager[object] = nullcontext()
    if isinstance(contender, Autocast):
        context = torch.autocast(contender.x.device.type, torch.bfloat16)
    with context:
        known = [contender.x, *contender.module.parameters()]
        return measure.saved_bytes(lambda: contender.module(contender.x)[:2], known)


def _markdown(environment: Row, rows: list[Row]) -> str:
    return "\n\n".join(_parts(environment, rows)) + "\n"


def _parts(environment: Row, rows: list[Row]) -> Iterator[str]:
    yield ", ".join(f"{key} {value}" for key, value in environment.items() if value)
    for title in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == title]
        yield f"{title}, {table.cell('shape', own[0]['shape'])}"
        yield table.markdown(own, hide=table.SHARED)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
