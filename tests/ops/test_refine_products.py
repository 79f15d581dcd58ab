"""Products of the composite `refine`: convolutions where PyTorch has a precision setting for those, as for TF32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rru_fast.arguments import RefineNeed, RefineUpstream
from rru_fast.composite import _products, refine
from rru_fast.testing import EXACT, poisoned_memory, relative_error
from tests import parity
from tests.parity import GROUPS, ODD_SHAPES, VARIANTS, Case


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run products as convolutions on any device and in any dtype."""
    monkeypatch.setattr(_products, "by_convolution", lambda x: True)


@pytest.mark.usefixtures("convolutions")
@pytest.mark.parametrize("case", [*VARIANTS, *GROUPS, *ODD_SHAPES], ids=str)
def test_convolutions_in_float64_equal_the_oracle(case: Case) -> None:
    call = parity.make_call(case)
    with poisoned_memory():
        got = parity.run(case, call, "composite")
    for name, wanted in parity.run(case, call, "reference").items():
        assert relative_error(got[name], wanted) <= EXACT, name


@pytest.mark.usefixtures("convolutions")
@pytest.mark.parametrize(
    "case", [Case(), Case(inputs="raw", mode="continued"), Case(inputs="appearance"), *ODD_SHAPES[8:18:2]], ids=str
)
def test_the_error_of_convolutions_is_at_most_twice_the_references(case: Case) -> None:
    parity.assert_refine_parity(case, torch.float32, "composite", 15)


@pytest.mark.usefixtures("convolutions")
def test_two_runs_by_convolution_are_bitwise_equal() -> None:
    case = Case((5, 4, 70, 4, 4), hidden=16)
    call = parity.make_call(case).map(lambda v: v.float())
    first, second = parity.run(case, call, "composite"), parity.run(case, call, "composite")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv"}


class LargeProducts(TorchDispatchMode):
    """Count products of at least `multiplications` multiplications, by operator name."""

    def __init__(self, multiplications: int) -> None:
        super().__init__()
        self.multiplications, self.calls = multiplications, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0].strip("_")
        if name in MATRIX_PRODUCTS or name == "convolution":
            left, right = [v for v in tree_iter(args) if isinstance(v, Tensor)][-2:]
            outputs = right.shape[0 if name == "convolution" else -1]  # per number on the left; the kernel size is 1
            self.calls[name] += left.numel() * outputs >= self.multiplications
        return func(*args, **(kwargs or {}))


def transition_products(case: Case, dtype: torch.dtype, device: str) -> tuple[Counter[str], Counter[str]]:
    """Count the transition's products in `refine`, forward and backward, on fake tensors."""
    clips, _, channels, height, width = case.shape
    products = LargeProducts(clips * height * width * channels * case.hidden)
    with FakeTensorMode():
        call = parity.make_call(case).map(lambda v: v.to(device, dtype))
        args = parity.operator_arguments(case, call)
        upstream = RefineUpstream(call.d_features, call.d_strips)
        with products:
            saved = refine.forward(args, save=True).saved
        forward, products.calls = products.calls, Counter()
        with products:
            refine.backward(upstream, saved, args, RefineNeed(need_x=True, need_weights=True))
    return +forward, +products.calls


PRODUCTS = [
    Case((3, 4, 40, 6, 5), hidden=20, inputs=inputs, mode=mode)
    for inputs in ("appearance+motion", "appearance", "raw")
    for mode in ("train", "continued")
]
FEW_POSITIONS = Case((3, 4, 40, 2, 2), hidden=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*PRODUCTS, FEW_POSITIONS], ids=str)
def test_on_a_gpu_the_transitions_products_are_convolutions(case: Case, dtype: torch.dtype) -> None:
    steps = case.shape[1] - (case.mode == "train")
    forward, backward = transition_products(case, dtype, "cuda")
    assert forward.keys() == backward.keys() == {"convolution"}
    assert forward["convolution"] >= steps
    assert backward["convolution"] >= 2 * steps  # the inputs' gradient and the weight's


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cuda"), (torch.float32, "cpu")], ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_in_float64_and_on_a_cpu_products_are_batched_matrix_products(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    forward, backward = transition_products(case, dtype, device)
    assert "bmm" in (forward | backward)
    assert set(forward | backward) <= {"bmm", "baddbmm", "addbmm"}
