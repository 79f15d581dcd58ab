"""Extreme values: all equal, large, huge, denormal, infinite and NaN, in maps, weights and features.

Results equal those of the reference, NaN and infinities in the same places; each test states its exceptions. 16-bit
tensors are compared with the reference in fp32 on the same values, since kernels compute in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
from rru_fast import reference
from rru_fast.types import State
from tests import parity
from tests.ops.test_batch_hard import random_batch
from tests.parity import Call, Case, Results

every_backend = pytest.mark.parametrize("backend", parity.COMPILED)
INF, NAN = float("inf"), float("nan")
VALUES = {
    torch.float32: {"equal": 0.7, "large": 1e15, "huge": 1e30, "denormal": 1e-40, "infinite": INF, "NaN": NAN},
    torch.float16: {"equal": 0.7, "large": 200.0, "huge": 6e4, "denormal": 1e-7, "infinite": -INF, "NaN": NAN},
}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2}
every_value = pytest.mark.parametrize("value", list(VALUES[torch.float32]))
WEIGHTS = ("w", "gamma", "beta", "w_s1", "w_s2", "w_c")


def value_classes(v: Tensor) -> Tensor:
    """Classify each value: 0 if finite, 1 if infinite, 2 if NaN."""
    return torch.where(v.isnan(), 2, v.isinf().int())


def assert_same(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Assert that NaN and infinities are in the same places and finite values are close."""
    wanted = wanted.to(got.dtype)
    assert torch.equal(value_classes(got), value_classes(wanted)), name
    numbers = wanted.isfinite()
    got, wanted = got[numbers].double(), wanted[numbers].double()
    if numbers.any():
        nearly = tolerance * float(wanted.abs().mean()) + 1e-7
        assert torch.allclose(got, wanted, rtol=tolerance, atol=nearly), name


def calls_with(value: str, mode: str) -> Iterator[tuple[str, Case, Call, float]]:
    """Yield calls of `refine` with the value in one element of X, all over X, and in each weight; with tolerances."""
    case = Case((4, 4, 6, 3, 2), mode=mode)
    for dtype, values in VALUES.items():
        number = values[value]
        for where in ("one number", "x", *WEIGHTS):
            call = parity.make_call(case).map(lambda v, dtype=dtype: v.to(dtype))
            if where == "one number":
                call.x[1, 2, 2, 1, 1] = number
            elif where == "x":
                call.x = torch.full_like(call.x, number) if value == "equal" else call.x.sign() * number
            else:
                call.weights[where].view(-1)[0] = number
            yield f"{where}, {dtype}", case, call, TOLERANCE[dtype]


def reference_with_exact_first_frame(call: Call) -> Results:
    """Run the reference in fp32 and eval mode from the second frame, with S_1 = X_1 as its state.

    Otherwise the reference also runs the gate at t = 1, S_1 = X_1 + Z_1 (X_1 - X_1), where a NaN in Z_1 makes S_1 and
    all later frames NaN. The other backends skip that step.
    """
    low = call.map(lambda v: v.float())
    first = low.x[:, 0]
    mean, var = low.buffers
    out = reference.refine(low.x[:, 1:], **low.weights, running_mean=mean, running_var=var, state=State(first, first))
    features = torch.cat((first[:, None], out.features), 1)
    assert out.state is not None
    return {"features": features, "strips": reference.strip_pool(features), "next_s": out.state.s}


@every_backend
@every_value
def test_in_eval_mode_refine_equals_the_reference(value: str, backend: str) -> None:
    for where, case, call, tolerance in calls_with(value, "eval"):
        if value == "infinite" and where.startswith("gamma"):
            continue  # F.batch_norm computes beta - mean gamma r, inf - inf; the backends multiply (u - mean) r first
        got = parity.run(case, call, backend)
        for name, wanted in reference_with_exact_first_frame(call).items():
            assert_same(f"{name}, {where}", got[name], wanted, tolerance)


@every_backend
@every_value
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_refine_is_finite_where_the_reference_is(mode: str, value: str, backend: str) -> None:
    """Outputs and gradients. The reference overflows more often: in its gate at t = 1 and in gradients of variances."""
    for where, case, call, _ in calls_with(value, mode):
        got = parity.run(case, call, backend)
        low = call.map(lambda v: v.float())
        for name, wanted in parity.run(case, low, "reference").items():
            lost = wanted.to(got[name].dtype).isfinite() & ~got[name].isfinite()
            assert not lost.any(), f"{name}, {where}"
        assert torch.equal(value_classes(got["features"][:, 0]), value_classes(call.x[:, 0])), where


@every_backend
@every_value
def test_in_training_refine_equals_the_reference(value: str, backend: str) -> None:
    for where, case, call, tolerance in calls_with(value, "train"):
        if not where.startswith(("one number", "x", "w,")):
            continue  # NaN in the reference's S_1: see reference_with_exact_first_frame
        names = ["running_mean", "running_var"]
        if value != "huge":  # a variance beyond fp32 is infinite here, but finite in F.batch_norm, which has fp64
            names += ["features", "strips"]
        got = parity.run(case, call, backend)
        wanted = parity.run(case, call.map(lambda v: v.float()), "reference")
        for name in names:
            result, expected = got[name], wanted[name]
            if name == "features":
                result, expected = result[:, 1:], expected[:, 1:]
            assert_same(f"{name}, {where}", result, expected, 2 * tolerance)


@every_backend
@every_value
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_batch_hard_triplet_equals_the_reference(margin: Any, metric: str, value: str, backend: str) -> None:
    """Losses, and NaN in the gradient wherever a loss is NaN; among ties backends may move different partners."""
    for dtype, values in VALUES.items():
        for where in ("one number", "a feature", "everywhere"):
            for seed in range(3):
                features, labels = random_batch((1, 70, 6), seed)
                features = features.to(dtype)
                if value == "equal" or where == "everywhere":
                    features = values[value] * (torch.ones_like(features) if value == "equal" else features.sign())
                elif where == "a feature":
                    features[0, 33] = values[value] * features[0, 33].sign()
                else:
                    features[0, 33, 2] = values[value]
                options: dict[str, Any] = {"metric": metric, "margin": margin, "reduction": "none"}
                leaf = features.requires_grad_()
                got = rru_fast.batch_hard_triplet(leaf, labels, backend=backend, **options)
                (gradient,) = torch.autograd.grad(got.sum(), leaf)  # type: ignore[union-attr]
                wanted = reference.batch_hard_triplet(features.detach().float(), labels, **options)
                assert_same(f"loss, {where}, {dtype}", got.detach(), wanted, TOLERANCE[dtype])  # type: ignore
                if got.isnan().any():  # type: ignore[union-attr]
                    assert gradient.isnan().any(), f"{where}, {dtype}"


@every_backend
@every_value
def test_strip_pool_equals_the_reference(value: str, backend: str) -> None:
    """The C++ kernel sums in fp64, where only the mean can overflow: it is compared with the reference in fp64."""
    for dtype, values in VALUES.items():
        for number in (values[value], torch.finfo(dtype).max * 0.9 if value == "huge" else values[value]):
            for where in ("one number", "everywhere"):
                s, upstream = torch.randn(2, 3, 4, 3, 5).to(dtype), torch.randn(2, 4, 3).to(dtype)
                if where == "everywhere":
                    s = torch.full_like(s, number) if value == "equal" else s.sign() * number
                else:
                    s[1, 2, 1, 0, 2] = upstream[1, 1, 1] = number
                results = []
                for name, wide in (
                    (backend, dtype),
                    ("reference", torch.float64 if backend == "cpu" else torch.float32),
                ):
                    leaf = s.to(wide).requires_grad_()
                    strips = rru_fast.strip_pool(leaf, backend=name)
                    results.append((strips.detach(), *torch.autograd.grad(strips, leaf, upstream.to(wide))))
                for what, got, wanted in zip(("strips", "gradient"), *results, strict=True):
                    assert_same(f"{what}, {where}, {dtype}", got, wanted, TOLERANCE[dtype])
