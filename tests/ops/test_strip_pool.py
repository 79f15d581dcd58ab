"""`strip_pool` of every backend against the oracle."""

from __future__ import annotations

import pytest
import torch

import rru_fast
from rru_fast import ops
from rru_fast.testing import assert_parity, gradients, poisoned_memory
from tests import parity
from tests.parity import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
default_backend_first = pytest.mark.parametrize("backend", parity.DEFAULT_FIRST)
native_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
LONG = (1, 900, 2, 4, 3)
SHAPES = [
    (2, 3, 4, 5, 6),
    (1, 1, 1, 1, 1),
    (3, 7, 2, 1, 9),
    (2, 40, 3, 8, 8),
    (2, 3, 70, 8, 8),  # more channels than one task
    (1, 2, 3, 9, 17),
    LONG,
]


@every_backend
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # 16-bit maps are summed in fp32 too, so fp32 covers the sum over 900 frames.
        pytest.param(shape, dtype, id=f"{shape}-{dtype}", marks=pytest.mark.exhaustive if long_16_bit else ())
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for shape in SHAPES
        for long_16_bit in [shape == LONG and dtype.itemsize == 2]
    ],
)
def test_equals_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    draws = []
    for _ in parity.draws(backend, 1 if dtype == torch.float64 else 5):
        s, upstream = torch.randn(shape).to(dtype), torch.randn(shape[0], shape[2], shape[3]).to(dtype)
        runs = []
        for name, leaf in ((backend, s.clone()), ("reference", s.clone()), ("reference", s.double())):
            leaf.requires_grad_()
            with poisoned_memory():
                strips = rru_fast.strip_pool(leaf, backend=name)
                found = {"strips": strips, **gradients([strips], [upstream.to(leaf.dtype)], {"s": leaf})}
            assert strips.dtype == found["d_s"].dtype == leaf.dtype
            runs.append(found)
        draws.append((runs[0], runs[1], runs[2]))
    assert_parity(draws)


@every_backend
def test_equals_the_strips_of_refine(backend: str) -> None:
    module = rru_fast.RRU(6, (3, 2), hidden=4, backend=backend)
    out = module(torch.randn(2, 5, 6, 3, 2))
    assert torch.allclose(rru_fast.strip_pool(out.features, backend=backend), out.strips, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strides_do_not_change_results(dtype: torch.dtype, backend: str) -> None:
    s = torch.randn(2, 3, 40, 5, 14).to(dtype)
    layouts = {
        "channels last": s.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "frames last": s.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
        "transposed maps": s.mT.contiguous().mT,
        "every second": s.repeat_interleave(2, 4)[..., ::2],
        "cut from larger": torch.cat([s, s], 4)[..., :14],
        "every second frame": s.repeat_interleave(2, 1)[:, ::2],
    }
    wanted = rru_fast.strip_pool(s, backend=backend)
    for name, same in layouts.items():
        assert torch.equal(same, s)
        got = rru_fast.strip_pool(same, backend=backend)
        assert torch.allclose(got, wanted, rtol=1e-13 if dtype == torch.float64 else 1e-2, atol=1e-14), name
    d_strips = torch.randn(2, 5, 40, dtype=torch.float64).mT
    d_s = [ops.strip_pool.strip_pool_backward(d, [2, 3, 40, 5, 14], backend) for d in (d_strips, d_strips.contiguous())]
    assert torch.equal(*d_s)


@native_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_results_are_bitwise_equal_for_any_number_of_threads(dtype: torch.dtype, backend: str) -> None:
    s, d_strips = torch.randn(3, 9, 70, 8, 8).to(dtype), torch.randn(3, 70, 8).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            leaf = s.clone().requires_grad_()
            strips = rru_fast.strip_pool(leaf, backend=backend)
            results.append((strips, *torch.autograd.grad(strips, leaf, d_strips)))
    finally:
        torch.set_num_threads(before)
    for alone, two, four in zip(*results, strict=True):
        assert torch.equal(alone, two)
        assert torch.equal(alone, four)


@default_backend_first
def test_opcheck(backend: str) -> None:
    s = torch.randn(2, 3, 4, 5, 6)
    torch.library.opcheck(ops.strip_pool.strip_pool, (s.clone().requires_grad_(), backend))
    torch.library.opcheck(ops.strip_pool.strip_pool_backward, (torch.randn(2, 4, 5), [2, 3, 4, 5, 6], backend))


@default_backend_first
def test_compiled_without_a_graph_break_equals_eager(backend: str) -> None:
    compiled = torch.compile(lambda s: rru_fast.strip_pool(s, backend=backend) * 2, fullgraph=True)
    s = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    out = compiled(s)
    out.sum().backward()
    assert torch.allclose(out, rru_fast.strip_pool(s, backend=backend) * 2)
    assert s.grad is not None
    assert torch.allclose(s.grad, torch.full_like(s, 2 / 18))


@every_backend
def test_second_order_gradients_raise(backend: str) -> None:
    s = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(rru_fast.strip_pool(s, backend=backend).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients are not implemented"):
        gradient.sum().backward()


@every_backend
def test_a_gradient_may_have_any_stride_along_a_dimension_of_size_1(backend: str) -> None:
    s = torch.randn(1, 2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 1, 3, dtype=torch.float64)
    results = []
    for strides in ((3, 3, 1), (1 << 20, 1 << 20, 1)):
        strips = rru_fast.strip_pool(s, backend=backend)
        results.append(torch.autograd.grad(strips, s, upstream.as_strided((1, 1, 3), strides))[0])
    assert torch.equal(*results)
