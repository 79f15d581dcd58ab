"""Hold an implementation to a float64 oracle: error, gradients, parity. Not part of `import rru_fast`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = [
    "EXACT",
    "Error",
    "assert_parity",
    "compare",
    "gradients",
    "median_errors",
    "no_relu_near_zero",
    "poisoned_memory",
    "relative_error",
]

EXACT = 1e-9
"""Relative error allowed in float64; sums in another order are within 1e-12."""

_NEAR_ZERO = 4  # epsilons of a dtype; a sum in it seldom moves as far
_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

Results = Mapping[str, Tensor]  # by the name of a tensor


class Error(NamedTuple):
    """Relative errors of a tensor against the oracle: of the implementation, of the reference, and the bound."""

    got: float
    reference: float
    allowed: float


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """L2 norm of `got - wanted` over the norm of `wanted`, computed in float64.

    Both have one shape and device, and any real dtypes. Returns the norm of the difference where `wanted` is zero,
    and inf where `got` holds a NaN.

    Raises:
        ValueError: the shapes differ.

    >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    0.1
    """
    if got.shape != wanted.shape:
        raise ValueError(f"got: got shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
    difference = (got.detach().double() - wanted.detach().double()).norm()
    size = wanted.detach().double().norm()
    relative = float(difference / size) if size > 0 else float(difference)
    return relative if relative == relative else float("inf")


def gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the inputs: d_x = sum_i (d outputs_i / d x)^T upstream_i, by name with "d_" in front.

    `upstream` has the outputs' shapes and dtypes, a gradient those of its input. An input that no output depends on has
    zeros.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradients([x.square()], [torch.ones(2)], {"x": x})
    {'d_x': tensor([2., 4.])}
    """
    found = torch.autograd.grad(list(outputs), list(inputs.values()), list(upstream), materialize_grads=True)
    return {f"d_{name}": gradient for name, gradient in zip(inputs, found, strict=True)}


def assert_parity(draws: Iterable[tuple[Results, Results, Results]], rounding: float | None = None) -> None:
    """Raise unless an implementation is as near the float64 oracle as a reference in its dtype, by a factor of two.

    The relative error of each tensor may be twice that of the reference in the same dtype, plus one rounding. In
    float64, where the reference is the oracle, it may be 1e-9.

    Args:
        draws: results by name for each draw of random inputs: of the implementation; of the reference in its dtype;
            of the reference in float64, the oracle, on the same values. Floating-point, of any shape. Medians over
            draws are compared: in a tensor of a few elements, chance decides the rounding of a single draw.
        rounding: added to twice the reference's error; by default the epsilon of the dtype of the implementation's
            tensor. Not used in float64.

    Raises:
        AssertionError: names the first tensor that is off, its error and the bound.
        ValueError: there are no draws, a tensor is missing, or a shape is not the oracle's.

    A reference that overflows in its dtype has an infinite error, and so allows any.

    >>> import torch, torch.nn.functional as F
    >>> from rru_fast.testing import assert_parity, gradients
    >>> def results(function, x):
    ...     x = x.detach().requires_grad_()
    ...     out = function(x)
    ...     return {"out": out, **gradients([out], [torch.ones_like(out)], {"x": x})}
    >>> def draw(x):
    ...     fast = lambda x: x * torch.sigmoid(x)
    ...     return results(fast, x), results(F.silu, x), results(F.silu, x.double())
    >>> assert_parity(draw(torch.randn(8, 64)) for _ in range(5))
    """
    for name, error in median_errors([compare(*draw, rounding) for draw in draws]).items():
        if error.got > error.allowed:
            raise AssertionError(f"{name}: got relative error {error.got:.2e}, wanted at most {error.allowed:.2e}")


def compare(got: Results, in_dtype: Results, oracle: Results, rounding: float | None = None) -> dict[str, Error]:
    """Errors of one draw by tensor name; arguments as in `assert_parity`. Tensors of `got` alone are not compared."""

    def error(name: str) -> Error:
        dtype = got[name].dtype
        reference = relative_error(in_dtype[name], oracle[name])
        allowed = 2 * reference + (torch.finfo(dtype).eps if rounding is None else rounding)
        if dtype == torch.float64:
            allowed = EXACT
        return Error(relative_error(got[name], oracle[name]), reference, allowed)

    if missing := [name for name in oracle if name not in got or name not in in_dtype]:
        raise ValueError(f"results: got none of {', '.join(missing)}, wanted all that the oracle has")
    return {name: error(name) for name in oracle}


def median_errors(draws: Sequence[Mapping[str, Error]]) -> dict[str, Error]:
    """Medians over draws of what `compare` returns."""
    if not draws:
        raise ValueError("draws: got none, wanted at least 1")
    return {name: Error(*map(median, zip(*(draw[name] for draw in draws), strict=True))) for name in draws[0]}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that PyTorch leaves uninitialized with NaN, and that of integers with their largest value.

    Deterministic algorithms are on inside: an operator without one raises RuntimeError. Settings are restored.

    >>> with poisoned_memory():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled


def no_relu_near_zero(run: Callable[[], object], dtype: torch.dtype) -> bool:
    """Return True if rounding to `dtype` leaves every ReLU of a float64 run on its side of zero.

    One ReLU that changes sides changes a gradient by a thousandth of its size, of the paper's two and a half million.
    In float32 this holds for every third draw of that size. In 16 bits thousands change sides in any draw: returns True
    without a run.

    run: calls the oracle in float64. ReLUs are found as `F.relu`, `nn.ReLU`, `torch.relu` or the tensor's method; an
    input of exactly zero is ignored: x - x is zero in any dtype.

    >>> [no_relu_near_zero(lambda: F.relu(torch.tensor([1, x]).double()), torch.float32) for x in (0.5, 1e-7)]
    [True, False]
    """
    if dtype.itemsize == 2:
        return True
    with _ReluInputs() as inputs:
        run()
    return bool(inputs.nearest > _NEAR_ZERO * torch.finfo(dtype).eps)


class _ReluInputs(TorchFunctionMode):
    """Smallest magnitude, zero excluded, among the ReLU inputs of the calls inside."""

    nearest = float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS:
            size = (args[0] if args else kwargs["input"]).detach().abs()
            nonzero = size[size > 0]
            if nonzero.numel() > 0:
                self.nearest = min(self.nearest, float(nonzero.min()))
        return func(*args, **(kwargs or {}))
