"""Run a third-party loss in fp64 on batches that tell near misses, and compare it with a formula of the operator."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rru_fast.compat import binding, watch
from rru_fast.compat.loss_form import Formula
from rru_fast.distributed import world_size

try:
    import numpy
except ImportError:  # PyTorch works without
    numpy = None  # type: ignore[assignment]

RTOL, ATOL = 1e-9, 2e-12  # sums in another order differ by 1e-14, and some cosine distances are at least 1e-12
MADE_OF = "rru_fast.batch_hard_triplet(..., return_distances=True) returns the two distances that such losses combine"
GATHER = "rru_fast.BatchHardTripletLoss(gather=True) forms the batch from all ranks"
Fill = Callable[[Tensor, Tensor, int], tuple[Any, ...]]  # a loss's arguments, of features, labels and a call's number


class NoMatch(Exception):
    """Why a loss cannot be swapped, and the option that would serve."""


class InFloat64(TorchFunctionMode):
    """Keep everything in fp64 on the CPU, also where a loss casts to another dtype or moves to a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if function is Tensor.cuda:
            return args[0]
        if function in (Tensor.to, Tensor.type):
            args = [_on_cpu(value) for value in args]
            kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    """Return fp64 for a floating-point dtype, the CPU for a device, and anything else unchanged."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return "cpu" if isinstance(value, torch.device) or (isinstance(value, str) and "cuda" in value) else value


def run(loss: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the loss's own forward in fp64; it may not communicate with other ranks."""
    with InFloat64():
        return call(loss, *args, **kwargs)


def call(loss: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the loss's own forward, on the CPU; it may not communicate with other ranks."""
    states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    guard = _profiled(_forbid_collectives) if world_size() > 1 else contextlib.nullcontext()
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), guard:
            return binding.original_forward(loss)(loss, *args, **kwargs)
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def _forbid_collectives(frame: Any, event: str, _: Any) -> None:
    if _is_collective(frame, event):
        raise NoMatch(f"it calls torch.distributed.{frame.f_code.co_name}; {GATHER}")


def _is_collective(frame: Any, event: str) -> bool:
    """Return True for a call of torch.distributed that is not our own."""
    if event != "call" or not _module(frame).startswith("torch.distributed"):
        return False
    while _module(frame).startswith("torch.distributed"):
        frame = frame.f_back
    return not _module(frame).startswith("rru_fast.")


def _module(frame: Any) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def set_training(loss: Any, training: bool) -> None:
    """Switch the loss, or the modules that a plain one holds, to training or eval mode."""
    for module in (loss,) if isinstance(loss, nn.Module) else vars(loss).values():
        if isinstance(module, nn.Module):
            module.train(training)


def check_side_effects(loss: Any, fill: Fill) -> int | None:
    """Run the loss in both modes; returns the number of ranks if it calls torch.distributed.

    Raises:
        NoMatch: it fails, sets something, or would communicate with other ranks.
    """
    called = False

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal called
        called = called or _is_collective(frame, event)

    for training in (True, False):
        set_training(loss, training)
        before = watch.watch(loss)
        try:
            with contextlib.nullcontext() if world_size() > 1 else _profiled(profile):
                run(loss, *fill(*features(3), 0))
        except NoMatch:
            raise
        except Exception as error:
            hint = GATHER if called else MADE_OF
            raise NoMatch(f"it fails on a batch of 4 x 3 features ({_line(error)}); {hint}") from None
        written = watch.changed(before)
        if written is not None:
            raise NoMatch(f"its forward sets {written}; {MADE_OF}")
    return world_size() if called else None


@contextmanager
def _profiled(profile: Callable[..., None]) -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def features(per_label: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Make 12 features (12, 6) and their labels: even labels overlap, odd ones are far from all others.

    They have few digits, so that the distance from a feature to itself is exactly the floor.
    """
    labels = torch.arange(12) // per_label
    near = torch.randint(-4096, 4097, (12, 6), generator=torch.Generator().manual_seed(0)).double() / 4096
    axis, sign = labels // 4, 1 - labels // 2 % 2 * 2
    far = nn.functional.one_hot(axis, 6) * (100 * sign * (labels % 2))[:, None]
    return ((near + far) * scale).requires_grad_(), labels


class Example(NamedTuple):
    """A batch, and what of the results on it is compared."""

    features: Tensor
    labels: Tensor
    may_fail: bool = False
    """Some originals raise, where the operator does not."""
    gradient: bool = True
    loss_alone: bool = False


TINY = 2.0**-24  # scale of features at which it shows how a norm is kept from 0


def examples(scales: list[float]) -> Iterator[Example]:
    """Yield batches of every scale, and of every kind of labels; a large one; ties; and what originals may refuse."""
    for scale in scales:
        yield Example(*features(3, scale))
    last = scales[-1]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(12, generator=generator)
    shuffled, labels = features(3, last)
    yield Example(shuffled.detach()[order].requires_grad_(), torch.tensor([7, -1, 100_000, 3])[labels[order]])
    many = torch.randn(96, 40, generator=generator, dtype=torch.float64) * last
    yield Example(many.requires_grad_(), torch.randperm(96, generator=generator) % 12)
    corners = torch.randint(0, 2, (12, 6), generator=generator) + 0.5
    yield Example((corners.double() * last).requires_grad_(), labels, gradient=False)
    yield Example(*features(1, last), may_fail=True)
    overlapping, _ = features(3, last)
    yield Example(overlapping, torch.tensor([0] * 4 + [1] * 4 + [2] * 3 + [3]), may_fail=True)
    yield Example(overlapping, torch.zeros(12, dtype=torch.int64), may_fail=True, loss_alone=True)


def verify(loss: Any, fill: Fill, formula: Formula, scales: list[float]) -> None:
    """Raise NoMatch unless the formula equals the loss, with gradients, on all examples."""
    all_examples = [*examples(scales), *([Example(*features(3, TINY))] if formula.norm != "none" else [])]
    for number, (training, example) in enumerate(product((True, False), all_examples)):
        set_training(loss, training)
        try:
            out = run(loss, *fill(example.features, example.labels, number))
        except NoMatch:
            raise
        except Exception as error:
            if example.may_fail:
                continue
            raise NoMatch(
                f"it fails on a batch of {len(example.labels)} features ({_line(error)}); {MADE_OF}"
            ) from None
        compare(out, formula(example.features, example.labels, mask=None, backend="auto"), example)


def compare(own: Any, fast: Any, example: Example) -> None:
    """Raise NoMatch unless the outputs of the loss and of the formula, and their gradients, are equal."""
    (wanted, wanted_gradient), (got, gradient) = (_results(out, example) for out in (own, fast))
    where = f"for labels {example.labels.tolist()[:12]}"
    if len(got) != len(wanted) or not all(map(is_equal, got, wanted)):
        raise NoMatch(f"it returns {describe(own)} {where}, the operator {describe(fast)}; {MADE_OF}")
    if not close(gradient, wanted_gradient):
        worst = float((gradient - wanted_gradient).abs().max())
        raise NoMatch(f"the operator's gradient differs from its by {worst:.2g} {where}; {MADE_OF}")


def _results(out: Any, example: Example) -> tuple[list[Any], Tensor]:
    """Return the outputs, and the gradient of the features."""
    outputs = list(out) if isinstance(out, tuple | list) else [out]
    outputs = outputs[:1] if example.loss_alone else outputs
    differentiable = [v for v in outputs if isinstance(v, Tensor) and v.requires_grad]
    gradient = None
    if example.gradient and differentiable:
        generator = torch.Generator().manual_seed(2)
        weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in differentiable]
        (gradient,) = torch.autograd.grad(differentiable, example.features, weights, allow_unused=True)
    return outputs, torch.zeros_like(example.features) if gradient is None else gradient


def is_equal(got: Any, wanted: Any) -> bool:
    """Return True if two outputs have one type and value, and both gradients or neither."""
    if type(got) is not type(wanted):
        return False
    if isinstance(got, Tensor):
        return got.requires_grad == wanted.requires_grad and close(got.detach(), wanted.detach())
    return isinstance(got, int | float) and close(torch.tensor(got), torch.tensor(wanted))


def close(got: Tensor, wanted: Tensor) -> bool:
    """Return True if two tensors have the same shape and values, up to rounding."""
    if got.shape != wanted.shape or got.is_floating_point() != wanted.is_floating_point():
        return False
    narrow = got.is_floating_point() and torch.float32 in (got.dtype, wanted.dtype)  # a ratio of counts
    rtol, atol = (1e-6, 1e-6) if narrow else (RTOL, ATOL)
    return torch.allclose(got.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)


def describe(out: Any) -> str:
    """Return an output in a few words."""
    if isinstance(out, tuple | list):
        return f"({', '.join(map(describe, out))})"
    if isinstance(out, Tensor):
        return f"{float(out.detach()):.6g}" if out.numel() == 1 else f"a tensor {tuple(out.shape)}"
    return f"a {type(out).__name__}"
