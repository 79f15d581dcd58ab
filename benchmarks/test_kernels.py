"""Operators under pytest-benchmark, to compare one commit with another: `pytest benchmarks`.

Each implementation is held to the float64 oracle before it is timed; one that is wrong fails and has no figure.
Implementations are timed one after the other: for ratios between them use `make bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from benchmarks.harness.measure import Fn
from benchmarks.harness.shapes import Shape
from benchmarks.implementations import batch_hard, strip_pool
from benchmarks.implementations.refine import AUTHORS, REFERENCE, Implementation, filter_valid, implementations
from rru_fast import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_, *BACKENDS = backends.serving(DEVICE)
Time = Callable[[str, Fn], None]
pytestmark = pytest.mark.benchmark(disable_gc=True, warmup=True, warmup_iterations=2)


@pytest.fixture(scope="module")
def toy(pytestconfig: pytest.Config) -> bool:
    """Run once, at tiny shapes."""
    return bool(pytestconfig.getoption("--toy"))


@pytest.fixture(scope="module")
def maps(toy: bool) -> Shape:
    """B T C H W; with `features`, the whole file takes less than a minute on two cores."""
    return (2, 3, 16, 4, 4) if toy else (4, 8, 512, 8, 8)


@pytest.fixture(scope="module")
def features(toy: bool) -> tuple[int, int]:
    """N D."""
    return (32, 8) if toy else (1024, 256)


@pytest.fixture
def timed(benchmark: BenchmarkFixture, toy: bool) -> Time:
    """Time a function, and show it in a group."""

    def run(group: str, fn: Fn) -> None:
        benchmark.group = group
        if toy:
            benchmark.pedantic(measure.call_and_wait, (fn,))  # type: ignore[no-untyped-call]
        else:
            benchmark(measure.call_and_wait, fn)

    return run


@pytest.fixture(scope="module", params=["training", "eval"])
def units(request: pytest.FixtureRequest, maps: Shape) -> tuple[str, dict[str, Implementation], dict[str, str]]:
    """A mode, the implementations whose outputs and gradients are right, and the reason for each that is left out."""
    found = implementations(maps, "float32", DEVICE, training=request.param == "training")
    found[REFERENCE].x.requires_grad_()  # all share it
    return request.param, *filter_valid(found)


@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
@pytest.mark.parametrize("name", [AUTHORS, REFERENCE, *BACKENDS])
def test_refine(
    timed: Time, units: tuple[str, dict[str, Implementation], dict[str, str]], name: str, passes: str
) -> None:
    mode, valid, refused = units
    if name in refused:
        pytest.fail(refused[name], pytrace=False)
    timed(f"refine, {mode}, {passes}", valid[name].forward if passes == "forward" else valid[name].step)


@pytest.mark.parametrize("name", strip_pool.implementations(DEVICE))
def test_strip_pool(timed: Time, maps: Shape, name: str) -> None:
    torch.manual_seed(0)
    s, upstream = strip_pool.maps(maps, DEVICE)
    backend = strip_pool.implementations(DEVICE)[name]
    strip_pool.check({name: backend}, s, upstream)
    timed("strip_pool, forward + backward", partial(strip_pool.results, backend, s, upstream))


@pytest.mark.parametrize("name", batch_hard.losses(DEVICE))
def test_batch_hard(timed: Time, features: tuple[int, int], name: str) -> None:
    torch.manual_seed(0)
    batch, labels = batch_hard.batch(*features, DEVICE)
    losses = batch_hard.losses(DEVICE)
    batch_hard.check({"eager": losses["eager"], name: losses[name]}, batch, labels)
    timed("batch_hard_triplet, forward + backward", partial(batch_hard.results, losses[name], batch, labels))
