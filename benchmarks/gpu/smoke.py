"""Short parity test: small edge cases in float64, the paper's shape in every dtype, bitwise equality of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rru_fast
from benchmarks.gpu.run import Sizes, set_precision
from benchmarks.harness.parity import format_error
from rru_fast.testing import compare, gradients, median_errors
from rru_fast.types import Metric
from tests.parity import GROUPS, ODD_SHAPES, Case, make_call, run, stable_seed

Results = Mapping[str, Tensor]
PAPER = Case((20, 8, 2048, 8, 8), hidden=256, spatial_hidden=128)
SMALL = [
    Case(),
    Case(mode="ragged"),
    Case(mode="continued"),
    Case(inputs="raw"),
    Case(attention="channel", inputs="appearance"),
    GROUPS[0],
    ODD_SHAPES[6],
    ODD_SHAPES[8],
]
# Dtype and precision of float32 products, as in `set_precision`, by title.
DTYPES = {
    "TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "defaults"),
    "float32": (torch.float32, "exact"),
    "float16": (torch.float16, "defaults"),
}


@dataclass(frozen=True)
class Plan:
    """Cases and dtypes of a smoke test."""

    small: list[Case]
    full: Case
    draws: int
    """Draws of the full case, of whose errors the median is compared."""
    dtypes: dict[str, tuple[torch.dtype, str]]
    """Dtypes of the full case, as in DTYPES."""
    others: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)
    """Dtypes of the other operators."""
    backend: str = "triton"


FULL = Plan(SMALL, PAPER, 1, DTYPES)
_TOY = Case((2, 2, 6, 3, 2))
TOY = Plan([_TOY], _TOY, 3, {name: DTYPES[name] for name in ("bfloat16", "float32")}, (torch.float32,))

# What the CUDA kernels carry, cases of few numbers in several draws: one CTA a clip and more.
_EVAL = [
    Case(mode="eval"),
    Case(mode="ragged"),
    Case(mode="continued"),
    Case((1, 3, 9, 3, 5), hidden=2, attention="channel", inputs="appearance", mode="eval"),
    Case((2, 5, 300, 5, 3), hidden=70, attention="spatial", mode="eval"),
]
_PAPER_EVAL = replace(PAPER, shape=(3, 16, 2048, 8, 8), mode="eval")
_TRAINING = [
    Case(),
    GROUPS[0],
    Case((3, 5, 300, 5, 3), hidden=70, attention="spatial"),
    Case((2, 3, 1024, 4, 4), hidden=64, attention="channel", inputs="appearance"),
    Case((20, 3, 600, 8, 4), hidden=128, spatial_hidden=64),
]
CUDA = [
    *(Plan([], case, 5, DTYPES, (), "cuda") for case in _EVAL),
    *(Plan([], case, 5, DTYPES, (), "cuda") for case in _TRAINING),
    Plan([], PAPER, 1, DTYPES, (), "cuda"),
    Plan([], _PAPER_EVAL, 1, DTYPES, (), "cuda"),
    Plan([], replace(_PAPER_EVAL, shape=(1, 16, 2048, 8, 4)), 1, DTYPES, (), "cuda"),
]
TOY_CUDA = [Plan([], _EVAL[0], 5, TOY.dtypes, (), "cuda")]


def smoke(device: torch.device, plan: Plan, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield findings: errors next to eager's in the same dtype, and "failed" where one exceeds its bound."""
    for case in plan.small:
        set_precision("exact", device)
        yield from _findings(f"float64 {case}", partial(_float64, case, device))
    for name, (dtype, precision) in plan.dtypes.items():
        set_precision(precision, device)
        title = f"{name} {plan.full}" if plan.backend == "triton" else f"{plan.backend}, {name} {plan.full}"
        yield from _findings(title, partial(_full, plan, dtype, device))
    set_precision("exact", device)
    for dtype in plan.others:
        for operator in OTHERS:
            title = f"{operator} {str(dtype).removeprefix('torch.')}"
            yield from _findings(title, partial(_other, operator, sizes, device, dtype))


def _findings(title: str, check: Callable[[], tuple[dict[str, Any], list[str]]]) -> Iterator[dict[str, Any]]:
    """Yield the finding of a check and its failures; an exception is both."""
    try:
        found, wrong = check()
    except Exception as error:  # any error: the other checks still run
        yield {title: format_error(error), "failed": f"{title}: {format_error(error)}"}
        return
    yield {title: found}
    for sentence in wrong:
        yield {"failed": f"{title}: {sentence}"}


def _float64(case: Case, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    call = make_call(case)
    got, oracle = run(case, call.map(lambda v: v.to(device)), "triton"), run(case, call, "reference")
    return _compare([({name: value.cpu() for name, value in got.items()}, oracle, oracle)])


def _full(plan: Plan, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    draws = []
    # A single draw is enough if rounding moves none of its ReLUs across zero.
    seeds = range(plan.draws) if plan.draws > 1 else [stable_seed(plan.full, dtype, device)]
    for seed in seeds:
        call = make_call(plan.full, dtype, seed).map(lambda v: v.to(device))
        low = call.map(lambda v: v.to(dtype))
        got = run(plan.full, low, plan.backend)
        draws.append((got, run(plan.full, low, "reference"), run(plan.full, call, "reference")))
    return _with_repetition(*_compare(draws), got, run(plan.full, low, plan.backend))


def _other(operator: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], list[str]]:
    function = OTHERS[operator]
    shape = sizes.maps if operator == "strip_pool" else sizes.features
    draws = []
    # Chance decides the rounding of a tensor of a few values in a single draw.
    for _ in range(1 if operator == "strip_pool" else sizes.draws):
        tensor = torch.randn(shape, device=device).to(dtype)
        got = function(tensor, "triton", sizes)
        draws.append((got, function(tensor, "reference", sizes), function(tensor.double(), "reference", sizes)))
    return _with_repetition(*_compare(draws), got, function(tensor, "triton", sizes))


def batch_hard(
    features: Tensor, backend: str, sizes: Sizes, metric: Metric = "euclidean", against_gallery: bool = False
) -> dict[str, Tensor]:
    """Return the loss of features (G, N, D) with its distances, and the gradients.

    against_gallery: mine in a gallery of other features, in which every identity has one clip.
    """
    n = features.shape[1]
    labels = torch.arange(n, device=features.device) // sizes.clips_per_identity
    leaves = {"features": features.detach().requires_grad_()}
    options: dict[str, Any] = {"margin": 0.4, "metric": metric, "return_distances": True, "backend": backend}
    if against_gallery:
        clips = slice(None, None, sizes.clips_per_identity)
        leaves["gallery"] = features.roll(1, 2)[:, clips].detach().requires_grad_()
        options |= {"gallery": leaves["gallery"], "gallery_labels": labels[clips]}
    outputs = list(rru_fast.batch_hard_triplet(leaves["features"], labels, **options))
    found = gradients(outputs, [torch.ones_like(v) for v in outputs], leaves)
    return {"value": outputs[0].detach(), **found}


def strip_pool(s: Tensor, backend: str, sizes: Sizes) -> dict[str, Tensor]:
    """Return the strips (B, C, H) of maps (B, T, C, H, W) and the gradient of the maps."""
    leaf = s.detach().requires_grad_()
    value = rru_fast.strip_pool(leaf, backend=backend)
    return {"value": value.detach(), "gradient": torch.autograd.grad(value.sum(), leaf)[0]}


OTHERS: dict[str, Callable[[Tensor, str, Sizes], dict[str, Tensor]]] = {
    "batch_hard": batch_hard,
    "batch_hard, cosine, gallery": partial(batch_hard, metric="cosine", against_gallery=True),
    "strip_pool": strip_pool,
}


def _compare(draws: Sequence[tuple[Results, Results, Results]]) -> tuple[dict[str, Any], list[str]]:
    """Return [error, eager's error] by tensor name, and a sentence per failure.

    draws: results of the implementation, of eager and of the oracle; medians over draws are compared.
    """
    found, wrong = {}, []
    for name, error in median_errors([compare(*draw) for draw in draws]).items():
        found[name] = [float(f"{value:.2e}") for value in (error.got, error.reference)]
        if error.got > error.allowed:
            wrong.append(f"{name} is off by {error.got:.1e}, allowed {error.allowed:.1e}")
    return found, wrong


def _with_repetition(
    found: dict[str, Any], wrong: list[str], got: Results, again: Results
) -> tuple[dict[str, Any], list[str]]:
    """Add the bitwise comparison of two runs to a finding and its failures."""
    differing = [name for name, value in got.items() if not torch.equal(value, again[name])]
    wrong = [*wrong, *(f"{name} differs between two runs" for name in differing)]
    return found | {"bitwise equal twice": not differing}, wrong
