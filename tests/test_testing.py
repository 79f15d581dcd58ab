"""`rru_fast.testing`: relative errors, gradients by name, parity, poisoned memory, ReLUs near zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rru_fast
from rru_fast.testing import (
    EXACT,
    assert_parity,
    compare,
    gradients,
    no_relu_near_zero,
    poisoned_memory,
    relative_error,
)

ONES = {"d_x": torch.ones(3, dtype=torch.float64)}


def ones_off_by(error: float, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"d_x": (ONES["d_x"] * (1 + error)).to(dtype)}


def test_an_error_is_relative_to_the_size_of_what_is_wanted() -> None:
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(wanted, wanted) == 0
    assert relative_error(wanted * 1.01, wanted) == pytest.approx(0.01)
    assert relative_error((wanted * 2**-20).to(torch.float16), wanted * 2**-20) == 0  # subnormal, squares underflow
    assert relative_error(torch.full((2,), 2.0), torch.zeros(2)) == pytest.approx(2 * 2**0.5)
    assert relative_error(torch.tensor([3.0, float("nan")]), wanted) == float("inf")


def test_gradients_have_their_inputs_names_and_are_zero_where_nothing_depends_on_one() -> None:
    x, y, z = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(3))
    found = gradients([x * y, y.sum()], [torch.tensor([1.0, 3.0]), torch.tensor(10.0)], {"x": x, "y": y, "z": z})
    wanted = {"d_x": [1.0, 6.0], "d_y": [11.0, 16.0], "d_z": [0.0, 0.0]}
    assert {name: gradient.tolist() for name, gradient in found.items()} == wanted


def test_an_error_may_be_twice_the_references_plus_one_rounding() -> None:
    reference = ones_off_by(2**-20, torch.float32)
    bound = 2 * 2**-20 + torch.finfo(torch.float32).eps
    assert compare(reference, reference, ONES)["d_x"] == pytest.approx((2**-20, 2**-20, bound))
    assert_parity([(ones_off_by(2**-19, torch.float32), reference, ONES)])
    with pytest.raises(AssertionError, match=r"^d_x: got relative error 2\.86e-06, wanted at most 2\.03e-06$"):
        assert_parity([(ones_off_by(3 * 2**-20, torch.float32), reference, ONES)])
    assert_parity([(ones_off_by(3 * 2**-20, torch.float32), reference, ONES)], rounding=2**-19)
    with pytest.raises(AssertionError, match=r"^d_x: got relative error inf"):
        assert_parity([({"d_x": torch.full((3,), float("nan"))}, reference, ONES)])


def test_results_without_a_tensor_and_no_draws_are_errors() -> None:
    with pytest.raises(ValueError, match="results: got none of d_x, wanted all that the oracle has"):
        compare({}, ONES, ONES)
    with pytest.raises(ValueError, match="draws: got none, wanted at least 1"):
        assert_parity([])


def test_one_rounding_is_of_the_dtype_of_each_tensor() -> None:
    oracle = {"x": torch.ones(2, dtype=torch.float64), "w": torch.ones(2, dtype=torch.float64)}
    got = {"x": torch.ones(2, dtype=torch.bfloat16), "w": torch.ones(2)}
    allowed = {name: error.allowed for name, error in compare(got, got, oracle).items()}
    assert allowed == {"x": 2**-7, "w": 2**-23}


def test_the_median_draw_decides() -> None:
    fine, off = ((ones_off_by(error, torch.float32), ONES, ONES) for error in (0, 3 * 2**-23))
    assert_parity([fine, off, fine])
    with pytest.raises(AssertionError):
        assert_parity(draw for draw in (off, fine, off))


def test_in_float64_an_error_may_be_1e_9_whatever_the_rounding() -> None:
    assert EXACT == 1e-9
    assert_parity([(ones_off_by(1e-12, torch.float64), ONES, ONES)])
    for rounding in (None, 1e-3):
        with pytest.raises(AssertionError, match=r"wanted at most 1\.00e-09$"):
            assert_parity([(ones_off_by(1e-8, torch.float64), ONES, ONES)], rounding)


def test_poisoned_memory_is_nan_and_the_settings_of_before_come_back() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), poisoned_memory():
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "relu",
    [F.relu, torch.relu, Tensor.relu, torch.nn.ReLU(), torch.nn.ReLU(inplace=True), lambda v: v.clone().relu_()],
)
def test_a_relu_that_rounding_may_switch_is_found(relu: Callable[[Tensor], Tensor]) -> None:
    values = torch.tensor([-1.0, 0.5, 0.0, 1e-7], dtype=torch.float64)
    assert not no_relu_near_zero(lambda: relu(values.clone()), torch.float32)
    assert no_relu_near_zero(lambda: relu(values[:3].clone()), torch.float32)
    assert no_relu_near_zero(lambda: relu(values.clone()), torch.float64)
    assert no_relu_near_zero(lambda: relu(values.clone()), torch.bfloat16)  # thousands switch whatever is drawn


def test_a_relu_of_the_reference_that_rounding_may_switch_is_found() -> None:
    rru: Any = rru_fast.reference.RRU(4, (2, 2)).double()
    assert no_relu_near_zero(lambda: rru(torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)), torch.float32)
    rru.transition_norm.weight.data.zero_()
    rru.transition_norm.bias.data.fill_(1e-8)
    assert not no_relu_near_zero(lambda: rru(torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)), torch.float32)
