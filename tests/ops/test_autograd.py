"""Autograd of the operators, which is the library's own in C++ and torch.library's without the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rru_fast
from rru_fast import ops
from tests.parity import BACKENDS

LABELS = torch.arange(8) % 3
W, GAMMA, W_C = torch.randn(5, 8), torch.rand(5), torch.randn(4, 5)


def refine(x: Tensor, backend: str) -> tuple[Tensor, ...]:
    return rru_fast.refine(x, W, GAMMA, GAMMA, w_c=W_C, training=True, backend=backend)[:2]


def triplet(features: Tensor, backend: str) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"reduction": "none", "return_distances": True}
    return tuple(rru_fast.batch_hard_triplet(features, LABELS, margin=5.0, backend=backend, **options))


OPERATORS: dict[str, tuple[Callable[[Tensor, str], tuple[Tensor, ...]], tuple[int, ...]]] = {
    "refine": (refine, (2, 3, 4, 3, 2)),
    "strip_pool": (lambda s, backend: (rru_fast.strip_pool(s, backend=backend),), (2, 3, 4, 3, 2)),
    "batch_hard": (triplet, (8, 6)),
    "batch_hard in groups": (triplet, (2, 8, 6)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def call(name: str, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a leaf and an operator's outputs of it."""
    function, shape = OPERATORS[name]
    leaf = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return leaf, function(leaf, backend)


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs]).sum()


@every_backend
@every_operator
def test_a_graph_is_kept_for_another_backward_only_if_asked(name: str, backend: str) -> None:
    leaf, outputs = call(name, backend)
    first, second = (torch.autograd.grad(total(outputs), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0
    total(outputs).backward()
    if name != "strip_pool":  # which saves no tensor
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(outputs[0].sum(), leaf)


@every_backend
@pytest.mark.parametrize("name", ["refine", "batch_hard", "batch_hard in groups"])
def test_changing_what_is_saved_is_an_error(name: str, backend: str) -> None:
    for changed in ("input", "output"):
        leaf, outputs = call(name, backend)
        with torch.no_grad():
            (leaf if changed == "input" else outputs[0 if name == "refine" else 1]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs[-1].sum(), leaf)


@every_backend
@every_operator
def test_an_output_that_is_not_saved_may_change_in_place(name: str, backend: str) -> None:
    leaf, outputs = call(name, backend)
    output = outputs[1 if name == "refine" else 0]
    (wanted,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
    output.mul_(4)  # exact, in every sum of the backward
    (got,) = torch.autograd.grad(output.sum(), leaf)
    assert torch.equal(got, 4 * wanted)


@every_backend
@every_operator
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool, backend: str) -> None:
    function, _ = OPERATORS[name]
    leaf, outputs = call(name, backend)
    (wanted,) = torch.autograd.grad(total(outputs), leaf)
    total(checkpoint(function, leaf, backend, use_reentrant=reentrant)).backward()
    assert torch.equal(leaf.grad, wanted)


@every_backend
def test_a_gallery_and_labels_from_inference_mode_are_trained_with(backend: str) -> None:
    features = torch.randn(8, 6).requires_grad_()
    with torch.inference_mode():
        gallery, gallery_labels, labels = torch.randn(9, 6), torch.arange(9) % 3, LABELS.clone()
    bank: dict[str, Any] = {"gallery": gallery, "gallery_labels": gallery_labels, "margin": 5.0}
    loss = rru_fast.batch_hard_triplet(features, labels, **bank, backend=backend)
    plain = rru_fast.batch_hard_triplet(features, labels, **bank, backend="reference")
    assert isinstance(loss, Tensor) and isinstance(plain, Tensor)
    assert torch.allclose(*(torch.autograd.grad(value, features)[0] for value in (loss, plain)), atol=1e-6)


@every_backend
def test_infinite_gradients_of_losses_of_0_are_ignored(backend: str) -> None:
    features = torch.randn(8, 6).requires_grad_()
    loss = rru_fast.batch_hard_triplet(features, LABELS, margin=-50.0, backend=backend)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, features, torch.tensor(float("inf")))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.skipif(rru_fast.backends.BACKENDS["cpu"] is not None, reason="the C++ kernels are not built")
def test_the_operator_itself_refuses_forward_mode() -> None:
    s = torch.randn(2, 3, 4, 3, 2)
    with pytest.raises(RuntimeError, match=r"rru_fast::strip_pool: got a backend whose forward-mode"):
        torch.func.jvp(lambda v: ops.strip_pool.strip_pool(v, "auto"), (s,), (s,))


@every_backend
def test_only_losses_and_distances_are_differentiable(backend: str) -> None:
    features = torch.randn(8, 6).requires_grad_()
    loss, d_pos, d_neg, positive, negative = ops.batch_hard.batch_hard(
        features, LABELS, None, None, 0.3, False, "euclidean", "mean", backend
    )
    assert all(value.requires_grad for value in (loss, d_pos, d_neg))
    assert not positive.requires_grad and not negative.requires_grad
