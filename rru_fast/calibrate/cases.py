"""Random calls of a kind, for parity and timing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rru_fast import functional, modules
from rru_fast.auto.kinds import BatchHardKind, Kind, RefineKind, StripPoolKind
from rru_fast.testing import gradients, no_relu_near_zero

Results = dict[str, Tensor]
# Elements of the main input of a parity check, in fp64: 256 MiB.
MOST_ELEMENTS = 2**25
SEEDS = range(20)

_K = TypeVar("_K", bound=Kind)


class Case(Protocol):
    """A call with its tensors."""

    def results(self, backend: str, *, exact: bool = False) -> Results:
        """Return the outputs, and the gradients "d_..." if the kind has them; in fp64 throughout if exact."""

    def caller(self, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that calls a backend as a user would, with the backward if the kind has one.

        It returns the gradients, if there are any, else the outputs, in the order of `results`.
        """


def make_case(kind: Kind, device: torch.device, seed: int) -> Case:
    """Return a random call; kinds, device and seed decide it, whatever other random numbers have been drawn."""
    maker: Any = _MAKERS[type(kind)]
    case: Case = maker(kind, device, torch.Generator(device).manual_seed(seed))
    return case


def draw_case(kind: Kind, device: torch.device, seed: int) -> tuple[Case, Results]:
    """Return a random call, none of whose ReLUs is near zero if a few draws have one, and its results in fp64."""
    for attempt in SEEDS:
        case = make_case(kind, device, seed + 1000 * attempt)
        oracle: Results = {}

        def run(case: Case = case, oracle: Results = oracle) -> None:
            oracle.update(case.results("reference", exact=True))

        stable = not isinstance(kind, RefineKind) or no_relu_near_zero(run, getattr(torch, kind.dtype))
        if stable:
            break
    return case, oracle or case.results("reference", exact=True)


def parity_kinds(kind: Kind) -> Iterator[Kind]:
    """Yield the four small calls and the call itself, cut to a size that fp64 can take, to be held to the oracle."""
    sizes = {
        RefineKind: _SMALL_MAPS,
        StripPoolKind: _SMALL_MAPS,
        BatchHardKind: _SMALL_FEATURES,
    }[type(kind)]
    for small in sizes:
        changes = {name: value for name, value in small.items() if hasattr(kind, name) and getattr(kind, name)}
        yield replace(kind, **changes)  # type: ignore[arg-type]
    yield cut(kind)


# Two sets of channels, positions and gate channels, for which kernels are compiled, with two numbers of clips each.
_ODD = {"channels": 37, "height": 5, "width": 3, "hidden": 17, "spatial_hidden": 7}
_EVEN = {"channels": 64, "height": 4, "width": 4, "hidden": 32, "spatial_hidden": 16}
_SMALL_MAPS = (
    {"clips": 3, "frames": 4, **_ODD},
    {"clips": 2, "frames": 5, **_ODD},
    {"clips": 4, "frames": 3, **_EVEN},
    {"clips": 3, "frames": 2, **_EVEN},
)
_SMALL_FEATURES = (
    {"groups": 1, "anchors": 12, "gallery": 21, "columns": 9},
    {"groups": 2, "anchors": 20, "gallery": 33, "columns": 9},
    {"groups": 1, "anchors": 32, "gallery": 64, "columns": 64},
    {"groups": 3, "anchors": 48, "gallery": 40, "columns": 64},
)


def cut(kind: _K) -> _K:
    """Return a kind with fewer frames, then clips, groups, anchors or candidates, so that parity fits in memory."""
    floors = (("frames", 8), ("clips", 2), ("groups", 1), ("gallery", 4), ("anchors", 4), ("frames", 2))
    for name, least in floors:
        while _elements(kind) > MOST_ELEMENTS and getattr(kind, name, 0) > least:
            kind = replace(kind, **{name: max(least, getattr(kind, name) // 2)})  # type: ignore[arg-type]
    return kind


def _elements(kind: Any) -> int:
    if isinstance(kind, BatchHardKind):
        # The reference holds all distances.
        n, m = kind.anchors, kind.gallery or kind.anchors
        return kind.groups * max((n + m) * kind.columns, n * m)
    return int(kind.clips * kind.frames * kind.channels * kind.height * kind.width)


class _RefineCase:
    """A module with random weights, its input and the gradients of its outputs."""

    def __init__(self, kind: RefineKind, device: torch.device, generator: torch.Generator) -> None:
        self.kind = kind
        random = partial(torch.randn, generator=generator, device=device)
        self.module = modules.RRU(
            kind.channels,
            (kind.height, kind.width),
            hidden=kind.hidden,
            spatial_hidden=max(1, kind.spatial_hidden),
            attention=kind.attention,  # type: ignore[arg-type]
            inputs=kind.inputs,  # type: ignore[arg-type]
            device=device,
            dtype=getattr(torch, kind.weight_dtype),
        ).train(kind.training)
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(random(parameter.shape) * 0.5 + 1)
                else:  # unit gain
                    parameter.copy_(random(parameter.shape) / parameter[0].numel() ** 0.5)
            norm = self.module.transition_norm
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(random(kind.hidden))
            norm.running_var.copy_(random(kind.hidden).square() + 0.5)
        self.x = _maps(kind, random)
        shape = (kind.clips, kind.channels, kind.height)
        self.upstream = [random(self.x.shape).to(self.x.dtype), random(shape).to(self.x.dtype)]

    def results(self, backend: str, *, exact: bool = False) -> Results:
        module, x, upstream = self._module(backend), self.x, self.upstream
        if exact:
            module, x, upstream = module.double(), x.double(), [u.double() for u in upstream]
        if not self.kind.gradients:
            with torch.no_grad():
                return dict(zip(_OUTPUTS, module(x)[:2], strict=True))
        x = x.detach().requires_grad_()
        out = module(x)[:2]
        found = gradients(out, upstream, {"x": x, **dict(module.named_parameters())})
        return {**{name: value.detach() for name, value in zip(_OUTPUTS, out, strict=True)}, **found}

    def caller(self, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        module = self._module(backend)
        module.cuda_graph = self.kind.graphed
        if not self.kind.gradients:
            return torch.no_grad()(lambda: tuple(module(self.x)[:2]))
        x = self.x.detach().requires_grad_()
        inputs = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x)[:2], inputs, self.upstream)

    def _module(self, backend: str) -> modules.RRU:
        module = copy.deepcopy(self.module)
        module.backend = backend
        return module


class _FunctionCase:
    """A function of one tensor with its input and the gradient of its output."""

    def __init__(self, kind: Kind, function: Callable[..., Tensor], x: Tensor, upstream: Tensor) -> None:
        self.kind, self.function, self.x, self.upstream = kind, function, x, upstream

    def results(self, backend: str, *, exact: bool = False) -> Results:
        x, upstream = (self.x.double(), self.upstream.double()) if exact else (self.x, self.upstream)
        if not self.kind.gradients:
            with torch.no_grad():
                return {"out": self.function(x, backend=backend)}
        x = x.detach().requires_grad_()
        out = self.function(x, backend=backend)
        return {"out": out.detach(), **gradients([out], [upstream], {"x": x})}

    def caller(self, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        if not self.kind.gradients:
            return torch.no_grad()(lambda: (self.function(self.x, backend=backend),))
        x = self.x.detach().requires_grad_()
        return lambda: torch.autograd.grad([self.function(x, backend=backend)], [x], [self.upstream])


def _strip_pool_case(kind: StripPoolKind, device: torch.device, generator: torch.Generator) -> Case:
    random = partial(torch.randn, generator=generator, device=device)
    s = _maps(kind, random)
    upstream = random(kind.clips, kind.channels, kind.height).to(s.dtype)
    return _FunctionCase(kind, functional.strip_pool, s, upstream)


def _batch_hard_case(kind: BatchHardKind, device: torch.device, generator: torch.Generator) -> Case:
    random = partial(torch.randn, generator=generator, device=device)
    groups = (kind.groups,) if kind.groups > 1 else ()

    def features(n: int) -> Tensor:
        return random(*groups, n, kind.columns).to(getattr(torch, kind.dtype))

    x = features(kind.anchors)
    if kind.layout == "strided":
        x = x.mT.contiguous().mT
    labels = torch.arange(kind.anchors, device=device) // 4
    gallery: dict[str, Any] = {}
    if kind.gallery:
        of = torch.arange(kind.gallery, device=device) % (kind.anchors // 4 + 1)
        gallery = {"gallery": features(kind.gallery), "gallery_labels": of}

    def loss(x: Tensor, backend: str) -> Tensor:
        own = {name: value.to(x.dtype) if name == "gallery" else value for name, value in gallery.items()}
        found = functional.batch_hard_triplet(x, labels, metric=kind.metric, backend=backend, **own)  # type: ignore[arg-type]
        assert isinstance(found, Tensor)
        return found

    return _FunctionCase(kind, loss, x, torch.ones((), device=device, dtype=x.dtype))


def _maps(kind: Any, random: Callable[..., Tensor]) -> Tensor:
    """Return random maps (B, T, C, H, W) in the kind's layout and dtype."""
    clips, frames, channels, height, width = kind.clips, kind.frames, kind.channels, kind.height, kind.width
    dtype = getattr(torch, kind.dtype)
    if kind.layout == "channels last":
        return random(clips, frames, height, width, channels).to(dtype).permute(0, 1, 4, 2, 3)
    if kind.layout == "strided":
        return random(clips, frames, channels, height, width + 1).to(dtype)[..., :width]
    return random(clips, frames, channels, height, width).to(dtype)


_OUTPUTS = ("features", "strips")
_MAKERS: dict[type[Any], Any] = {
    RefineKind: _RefineCase,
    StripPoolKind: _strip_pool_case,
    BatchHardKind: _batch_hard_case,
}
