"""Random calls: every backend gives the results of the fp64 oracle, or raises the error that the reference raises.

By default a few fixed examples of each property; with `-m nightly`, 10,000 new ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rru_fast
from rru_fast.testing import EXACT, assert_parity, gradients, relative_error
from rru_fast.types import State
from tests import parity
from tests.helpers.valid_args import B, C, H, T, W, arguments
from tests.parity import Call, Case, Results

every_backend = pytest.mark.parametrize("backend", parity.COMPILED)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NIGHTLY = 10_000


def examples(few: int) -> pytest.MarkDecorator:
    """Run `few` // 3 examples of a property by default, `few` in `make test-all` and 10,000 in the nightly run."""
    more = [pytest.param(few, marks=pytest.mark.exhaustive), pytest.param(NIGHTLY, marks=pytest.mark.nightly)]
    return pytest.mark.parametrize("count", [few // 3, *more])


def check(count: int, strategy: st.SearchStrategy[Any], claim: Callable[[Any], None]) -> None:
    """Check the claim on `count` examples."""
    fixed = count < NIGHTLY
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run = settings(
        max_examples=count, deadline=None, derandomize=fixed, print_blob=not fixed, suppress_health_check=slow
    )
    run(given(strategy)(claim))()


@dataclass(frozen=True)
class Layout:
    """Memory layout of a tensor."""

    order: tuple[int, ...]  # its dimensions, outermost first
    gaps: int | None  # the dimension sliced with step 2 from one twice as long
    offset: bool  # True for a storage offset above 0
    same: int | None  # the dimension expanded from its first slice, with a stride of 0; changes the values

    def __call__(self, v: Tensor) -> Tensor:
        shape = v.shape
        v = v.permute(self.order).contiguous()
        if self.gaps is not None:
            v = v.repeat_interleave(2, self.gaps).unflatten(self.gaps, (-1, 2)).select(self.gaps + 1, 0)
        if self.offset:
            v = torch.cat((v, v))[len(v) :]
        v = v.permute([self.order.index(d) for d in range(v.dim())])
        return v if self.same is None else v.narrow(self.same, 0, 1).expand(shape)


def layouts(dims: int, same: bool = False) -> st.SearchStrategy[Layout]:
    dimension = st.none() | st.integers(0, dims - 1)
    return st.builds(
        Layout, st.permutations(range(dims)).map(tuple), dimension, st.booleans(), dimension if same else st.none()
    )


@dataclass(frozen=True)
class Refining:
    """A call of `refine`: case, dtype and memory layouts."""

    case: Case
    dtype: torch.dtype
    maps: Layout
    upstream: Layout
    state: Layout
    matrices: Layout
    wide: bool  # float32 weights with 16-bit maps
    frozen: tuple[str, ...]
    seed: int

    def set_layouts(self, call: Call) -> Call:
        """Return the call with its tensors in their layouts, and weights in float32 if `wide`."""

        def weight(v: Tensor) -> Tensor:
            v = v.float() if self.wide and v.dtype in (torch.float16, torch.bfloat16) else v
            return self.matrices(v) if v.dim() == 2 else v

        return replace(
            call,
            x=self.maps(call.x),
            weights={name: weight(v) for name, v in call.weights.items()},
            state=None if call.state is None else State(self.state(call.state.x), self.state(call.state.s)),
            d_features=self.upstream(call.d_features),
        )

    def run(self, backend: str, dtype: torch.dtype, seed: int) -> Results:
        call = parity.make_call(self.case, self.dtype, seed).map(lambda v: v.to(dtype))
        return parity.run(self.case, self.set_layouts(call), backend, self.frozen)


@st.composite
def refinings(draw: st.DrawFn) -> Refining:
    """Calls of `refine` that are valid unless a channel has a single value."""
    mode = draw(st.sampled_from(["train", "train", "eval", "ragged", "continued"]))
    groups = draw(st.integers(1, 3)) if mode == "train" else 1
    clips = groups * draw(st.integers(1, 4))
    frames, height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    case = Case(
        (clips, frames, draw(st.integers(1, 9) | st.integers(60, 70)), height, width),
        hidden=draw(st.integers(1, 9) | st.integers(60, 70)),
        spatial_hidden=draw(st.integers(1, 9)),
        attention=draw(st.sampled_from(["both", "spatial", "channel"])),
        inputs=draw(st.sampled_from(["appearance+motion", "appearance", "raw"])),
        mode=mode,
        bn_groups=groups,
    )
    maps = draw(layouts(5, same=True))
    # Where all values of a channel are equal, their deviation is rounding noise, and so are quotients by it.
    if {0: height * width, 3: clips // groups * width, 4: clips // groups * height}.get(maps.same, 2) == 1:
        maps = replace(maps, same=None)
    frozen = draw(st.lists(st.sampled_from(["x", "w", "gamma", "beta", "w_s1", "w_c", "state_x"]), unique=True))
    return Refining(
        case,
        draw(st.sampled_from(DTYPES)),
        maps,
        draw(layouts(5, same=True)),
        draw(layouts(4)),
        draw(layouts(2)),
        draw(st.booleans()),
        tuple(frozen),
        draw(st.integers(0, 2**16)),
    )


def assert_parity_over_draws(call: Refining | Pooling | Mining, backend: str) -> None:
    """Assert `assert_parity` over 9 draws, or where those fail over 99, to rule out chance."""

    def draw(seed: int) -> tuple[Results, Results, Results]:
        got, low = (call.run(name, call.dtype, seed) for name in (backend, "reference"))
        return got, low, call.run("reference", torch.float64, seed)

    rounding = torch.finfo(call.dtype).eps  # also for float32 gradients of weights beside 16-bit maps
    try:
        assert_parity([draw(call.seed + i) for i in range(9)], rounding)
    except AssertionError:
        assert_parity([draw(call.seed + i) for i in range(99)], rounding)


def result_or_error(call: Callable[[], Any]) -> Any:
    """Return the call's result, or the type and message of its error."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        return type(error), str(error)


@every_backend
@examples(60)
def test_refine_equals_the_oracle(count: int, backend: str) -> None:
    def claim(call: Refining) -> None:
        oracle = result_or_error(lambda: call.run("reference", torch.float64, call.seed))
        if is_error(oracle):
            assert oracle[1].startswith("Expected more than 1 value per channel when training")
            assert result_or_error(lambda: call.run(backend, call.dtype, call.seed)) == oracle
        elif call.dtype == torch.float64:
            got = call.run(backend, torch.float64, call.seed)
            for name, wanted in oracle.items():
                assert relative_error(got[name], wanted) <= EXACT, name
        else:
            assert_parity_over_draws(call, backend)

    check(count, refinings(), claim)


@dataclass(frozen=True)
class Pooling:
    """A call of `strip_pool`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    maps: Layout
    upstream: Layout
    seed: int

    def run(self, backend: str, dtype: torch.dtype, seed: int) -> Results:
        g = torch.Generator().manual_seed(seed)
        clips, _, channels, height, _ = self.shape
        s, upstream = (torch.randn(v, generator=g).to(self.dtype) for v in (self.shape, (clips, channels, height)))
        leaf = self.maps(s.to(dtype)).detach().requires_grad_()
        strips = rru_fast.strip_pool(leaf, backend=backend)
        return {"strips": strips.detach(), **gradients([strips], [self.upstream(upstream.to(dtype))], {"s": leaf})}


poolings = st.builds(
    Pooling,
    st.tuples(*[st.integers(1, 6)] * 2, st.integers(1, 6) | st.integers(60, 70), *[st.integers(1, 9)] * 2),
    st.sampled_from(DTYPES),
    layouts(5, same=True),
    layouts(3, same=True),
    st.integers(0, 2**16),
)


@every_backend
@examples(30)
def test_strip_pool_equals_the_oracle(count: int, backend: str) -> None:
    def claim(call: Pooling) -> None:
        assert_parity_over_draws(call, backend)

    check(count, poolings, claim)


@dataclass(frozen=True)
class Mining:
    """A call of `batch_hard_triplet`."""

    shape: tuple[int, ...]
    identities: int
    label_dtype: torch.dtype
    dtype: torch.dtype
    layout: Layout
    margin: Any
    metric: str
    reduction: str
    seed: int
    gallery: int | None  # M

    def run(self, backend: str, dtype: torch.dtype, seed: int) -> Results:
        g = torch.Generator().manual_seed(seed)

        def draw(n: int) -> tuple[Tensor, Tensor]:
            shape = (*self.shape[:-2], n, self.shape[-1])
            features = torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype)
            labels = torch.randint(0, self.identities, (2 * n,), generator=g).to(self.label_dtype)[::2]
            return self.layout(features.to(dtype)).detach().requires_grad_(), labels

        leaf, labels = draw(self.shape[-2])
        leaves = {"d_features": leaf}
        options: dict[str, Any] = {"margin": self.margin, "metric": self.metric, "reduction": self.reduction}
        if self.gallery is not None:
            leaves["d_gallery"], options["gallery_labels"] = draw(self.gallery)
            options["gallery"] = leaves["d_gallery"]
        out = rru_fast.batch_hard_triplet(leaf, labels, return_indices=True, backend=backend, **options)
        assert isinstance(out, tuple)
        loss, positive, negative = out
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        results = {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
        return results | ({"positive": positive, "negative": negative} if self.dtype == torch.float64 else {})


@st.composite
def minings(draw: st.DrawFn) -> Mining:
    """Calls of `batch_hard_triplet` without ties; tests/ops/test_batch_hard.py has coincident points."""
    groups = draw(st.lists(st.integers(1, 5), max_size=1))
    n = draw(st.integers(1, 20) | st.integers(60, 140))
    shape = (*groups, n, draw(st.integers(2, 20) | st.integers(60, 70)))
    layout = draw(layouts(len(shape), same=True))
    if layout.same is not None and layout.same != len(shape) - 3:  # equal points or equal components: ties
        layout = replace(layout, same=None)
    return Mining(
        shape,
        draw(st.integers(1, n)),
        draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64])),
        draw(st.sampled_from(DTYPES)),
        layout,
        draw(st.sampled_from([0.3, 0, -0.5, 2, Fraction(1, 3), np.float32(0.3), "soft"])),
        draw(st.sampled_from(["euclidean", "cosine"])),
        draw(st.sampled_from(["mean", "sum", "none"])),
        draw(st.integers(0, 2**16)),
        draw(st.none() | st.integers(1, 20) | st.integers(60, 140)),
    )


@every_backend
@examples(50)
def test_batch_hard_triplet_equals_the_oracle(count: int, backend: str) -> None:
    def claim(call: Mining) -> None:
        if call.dtype == torch.float64:
            got, oracle = (call.run(name, torch.float64, call.seed) for name in (backend, "reference"))
            for name in ("positive", "negative"):
                assert torch.equal(got.pop(name), oracle.pop(name)), name
            for name, wanted in oracle.items():
                assert relative_error(got[name], wanted) <= EXACT, name
            return
        assert_parity_over_draws(call, backend)

    check(count, minings(), claim)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] = ()) -> Tensor:
    """Tensors of any shape, dtype, layout and device, often of the given shape."""
    sizes = draw(st.just(shape) | st.lists(st.integers(0, 7), max_size=6).map(tuple))
    dtype = draw(st.sampled_from([torch.float32, *DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64]))
    made = draw(st.sampled_from(["dense", "dense", "sparse", "meta", "leaf"]))
    if made == "meta":
        return torch.ones(sizes, dtype=dtype, device="meta")
    tensor = torch.ones(sizes, dtype=dtype)
    if made == "sparse":
        return tensor.to_sparse()
    return tensor.requires_grad_() if made == "leaf" and tensor.is_floating_point() else tensor


def anything(good: Any) -> st.SearchStrategy[Any]:
    """Values of any type that a caller may pass in place of `good`."""
    shape = tuple(good.shape) if isinstance(good, Tensor) else ()
    numbers = st.sampled_from([0, 1, 2, -1, True, 0.5, -0.5, 1e300, float("inf"), float("nan"), 10**400])
    others = st.sampled_from([Fraction(1, 2), np.float32(0.5), np.int64(2), np.ones(2), np.ones((2, 3, 4, 3, 2)), 1j])
    words = st.sampled_from(["", "soft", "raw", "appearance", "cosine", "none", "auto", "cpu", b"raw"])
    states = st.builds(
        lambda x, s, kind: kind((x, s)), *[tensors((B, C, H, W))] * 2, st.sampled_from([tuple, list, State._make])
    )
    small = st.sampled_from([None, [], [1.0], (), {}, torch.nn.Identity()])
    return st.one_of(numbers, others, words, states, small, tensors(shape), tensors((B,)))


def with_one_replaced(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of a valid call with one of them replaced."""
    return st.sampled_from(list(good)).flatmap(lambda name: anything(good[name]).map(lambda v: {**good, name: v}))


READS = re.compile(r"[\w., \[\]]+: got .+, wanted .+|Expected more than 1 value per channel", re.DOTALL)
OPTIONS = {
    "inputs": "appearance+motion",
    "momentum": 0.1,
    "eps": 1e-3,
    "bn_groups": 1,
    "process_group": None,
    "lengths": None,
    "state": None,
}
CALLS: dict[Callable[..., Any], list[dict[str, Any]]] = {
    rru_fast.refine: [{**arguments(), **OPTIONS, "training": training} for training in (True, False)],
    rru_fast.strip_pool: [{"s": torch.randn(B, T, C, H, W)}],
    rru_fast.batch_hard_triplet: [
        {
            "features": torch.randn(6, 4),
            "labels": torch.arange(6) // 2,
            "margin": 0.3,
            "metric": "euclidean",
            "reduction": "none",
            "gallery": gallery,
            "gallery_labels": None if gallery is None else torch.arange(5) // 2,
        }
        for gallery in (None, torch.randn(5, 4))
    ],
}


@every_backend
@examples(100)
def test_any_argument_gives_the_result_or_the_error_of_the_reference(count: int, backend: str) -> None:
    calls = [(function, good) for function, goods in CALLS.items() for good in goods]
    strategy = st.sampled_from(calls).flatmap(lambda call: st.tuples(st.just(call[0]), with_one_replaced(call[1])))

    def claim(call: tuple[Callable[..., Any], dict[str, Any]]) -> None:
        function, given_ = call
        got, wanted = (
            result_or_error(lambda name=name: function(**copy_buffers(given_), backend=name))
            for name in (backend, "reference")
        )
        if is_error(wanted):
            assert READS.match(wanted[1]), wanted
            assert got == wanted
            return
        if is_error(got):  # only the backend refuses it
            assert got[1].startswith(f"backend: got {backend!r} with tensors on meta, wanted"), got
            return
        for value, expected in zip(flatten_tensors(got), flatten_tensors(wanted), strict=True):
            if expected.device.type == "meta":
                assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
            else:
                assert torch.allclose(value.double(), expected.double(), rtol=1e-2, atol=1e-2, equal_nan=True)

    check(count, strategy, claim)


def is_error(result: Any) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


def copy_buffers(given_: dict[str, Any]) -> dict[str, Any]:
    """Clone the buffers among the arguments, which a call in training updates in place."""
    return {name: v.clone() if isinstance(v, Tensor) and not v.requires_grad else v for name, v in given_.items()}


def flatten_tensors(returned: Any) -> list[Tensor]:
    """List the tensors in a call's result, nested or not."""
    if isinstance(returned, Tensor):
        return [returned]
    return [v for part in returned if part is not None for v in flatten_tensors(part)]
