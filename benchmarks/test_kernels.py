"""The operators under pytest-benchmark, to compare one commit with another: `pytest benchmarks`.

Each implementation is held to the float64 oracle before it is timed; one that is wrong fails, and has no figure. Times
here are each implementation's own, one after the other: ratios between implementations are those of `make bench`.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import batch_hard, measure, strip_pool
from benchmarks.contenders import AUTHORS, REFERENCE, Contender, Shape, contenders, sifted
from rru_fast import config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_, *BACKENDS = config.serving(DEVICE)
MODES = ("training", "eval")
PASSES = ("forward", "forward + backward")
pytestmark = pytest.mark.benchmark(max_time=0.5, disable_gc=True, warmup=True, warmup_iterations=2)


@pytest.fixture
def maps(request: pytest.FixtureRequest) -> Shape:
    """B T C H W: a shape at which all of this takes less than a minute on two cores."""
    return (2, 3, 16, 4, 4) if request.config.getoption("--toy") else (4, 8, 512, 8, 8)


@pytest.fixture
def features(request: pytest.FixtureRequest) -> tuple[int, int]:
    """N D, likewise."""
    return (32, 8) if request.config.getoption("--toy") else (1024, 256)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [AUTHORS, REFERENCE, *BACKENDS])
def test_refine(benchmark: BenchmarkFixture, maps: Shape, name: str, mode: str, passes: str) -> None:
    right, refused = _field(maps, mode)
    if name in refused:
        pytest.fail(refused[name])
    benchmark.group = f"refine, {mode}, {passes}"
    benchmark(measure.finished, right[name].forward if passes == "forward" else right[name].step)


@pytest.mark.parametrize("name", strip_pool.backends(DEVICE))
def test_strip_pool(benchmark: BenchmarkFixture, maps: Shape, name: str) -> None:
    torch.manual_seed(0)
    s, upstream = strip_pool.maps(maps, DEVICE)
    backend = strip_pool.backends(DEVICE)[name]
    strip_pool.check({name: backend}, s, upstream)
    benchmark.group = "strip_pool, forward + backward"
    benchmark(measure.finished, partial(strip_pool.results, backend, s, upstream))


@pytest.mark.parametrize("name", batch_hard.losses(DEVICE))
def test_batch_hard(benchmark: BenchmarkFixture, features: tuple[int, int], name: str) -> None:
    torch.manual_seed(0)
    batch, labels = batch_hard.batch(*features, DEVICE)
    losses = batch_hard.losses(DEVICE)
    batch_hard.check({"eager": losses["eager"], name: losses[name]}, batch, labels)
    benchmark.group = "batch_hard_triplet, forward + backward"
    benchmark(measure.finished, partial(batch_hard.results, losses[name], batch, labels))


@cache
def _field(maps: Shape, mode: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """The implementations that are right, outputs and gradients, and why another is not among them."""
    field = contenders(maps, "float32", DEVICE, training=mode == "training")
    field[REFERENCE].x.requires_grad_()  # all have the same
    return sifted(field)
