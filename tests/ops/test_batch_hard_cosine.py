"""Cosine distances of `batch_hard_triplet`, of features that the kernels normalize, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import rru_fast
from rru_fast.testing import EXACT, relative_error
from tests import parity
from tests.ops.test_batch_hard import every_backend, random_batch

gallery_or_not = pytest.mark.parametrize("gallery", [False, True])


def run(features: Tensor, labels: Tensor, backend: str, gallery: bool, **options: Any) -> parity.Results:
    """Return loss, distances and gradients; of a gallery, the second half of the features, together with theirs."""
    n = len(labels) // 2 if gallery else len(labels)
    leaf = features.detach().requires_grad_()
    mined_in = {"gallery": leaf[..., n:, :], "gallery_labels": labels[n:]} if gallery else {}
    options = {"metric": "cosine", "reduction": "none", "return_distances": True, "backend": backend, **options}
    out = rru_fast.batch_hard_triplet(leaf[..., :n, :], labels[:n], **mined_in, **options)
    names = ("loss", "d_pos", "d_neg")
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=torch.float64).view_as(out[0]).to(features.dtype)
    torch.autograd.backward(out, [weights, 2 * weights - 2, 1.3 - weights])
    return {name: value.detach() for name, value in zip(names, out, strict=True)} | {"d_features": leaf.grad}


def draw(seed: int = 0, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Draw 24 features per group, the second half of which has all labels of the first."""
    features, _ = random_batch((groups, 24, 9), seed)
    return features, torch.arange(24) % 4


@every_backend
@pytest.mark.parametrize(("gallery", "apart"), [(False, 3e-3), (True, 3e-3), (True, 1e-4)])
def test_float32_distances_of_near_parallel_vectors_keep_their_digits(
    gallery: bool, apart: float, backend: str
) -> None:
    # The two features of each label are near parallel, of different lengths. Without a gallery farther apart than
    # products resolve, by which the positive is selected and not the anchor itself.
    labels = torch.arange(24) % 12
    noise, directions = random_batch((2, 24, 9))[0], random_batch((2, 12, 9), 1)[0]
    lengths = 10 ** torch.linspace(-3, 3, 24, dtype=torch.float64)[:, None]
    features = ((directions[:, labels] + apart * noise) * lengths).float()
    n, found = 12 if gallery else 24, []
    for f, name in ((features, backend), (features.double(), "reference")):
        leaf = f.requires_grad_()
        mined_in = {"gallery": leaf[:, n:], "gallery_labels": labels[n:]} if gallery else {}
        options = {"metric": "cosine", "return_distances": True, "backend": name}
        _, d_pos, _ = rru_fast.batch_hard_triplet(leaf[:, :n], labels[:n], **mined_in, **options)
        (gradient,) = torch.autograd.grad(d_pos.sum(), leaf)
        found.append((d_pos.detach().double(), gradient.double() * lengths))
    (got, gradient), (wanted, wanted_gradient) = found
    # Rounding of unit vectors, 1e-7, relative to what they are apart; 1 - cos would be off by 1e-7 / apart^2.
    assert ((got - wanted) / wanted).abs().max() < 1e-6 / apart
    assert relative_error(gradient, wanted_gradient) < 1e-6 / apart


@gallery_or_not
@every_backend
@pytest.mark.parametrize("length", [0.0, 1e-14, 0.9e-12, 1.1e-12, 1e-3, 1e3], ids=str)
@pytest.mark.parametrize("which", ["one", "every second", "all"])
def test_short_and_zero_vectors_have_distances_and_gradients_of_normalize(
    which: str, length: float, gallery: bool, backend: str
) -> None:
    features, labels = draw()
    short = {"one": slice(13, 14), "every second": slice(0, None, 2), "all": slice(None)}[which]
    features[:, short] *= length / features[:, short].norm(dim=-1, keepdim=True)
    if length == 0:  # distances to zero vectors are equal: ties, whose gradients go to the same one in every backend
        assert (features[:, short] == 0).all()
    got, oracle = (run(features, labels, name, gallery) for name in (backend, "reference"))
    for name, wanted in oracle.items():
        assert relative_error(got[name], wanted) <= EXACT, name


@gallery_or_not
@every_backend
@pytest.mark.parametrize("length", [0.0, 1e-14, 1e-25], ids=str)
def test_short_vectors_in_float32(length: float, gallery: bool, backend: str) -> None:
    features, labels = draw()
    features[:, ::2] *= length
    low = features.float()
    got, oracle = run(low, labels, backend, gallery), run(low.double(), labels, "reference", gallery)
    for name in ("loss", "d_pos", "d_neg"):
        assert torch.allclose(got[name].double(), oracle[name], rtol=0, atol=1e-6), name
    assert got["d_features"].isfinite().all()


@gallery_or_not
@every_backend
def test_a_vector_whose_norm_overflows_is_a_zero_vector(gallery: bool, backend: str) -> None:
    features, labels = draw()
    features = features.float()
    features[:, ::5] *= 1e30
    got = run(features, labels, backend, gallery)
    features[:, ::5] = 0
    wanted = run(features, labels, backend, gallery)
    for name in ("loss", "d_pos", "d_neg"):
        assert torch.allclose(got[name], wanted[name], rtol=1e-6), name


@gallery_or_not
@every_backend
def test_lengths_change_nothing_but_the_scale_of_gradients(gallery: bool, backend: str) -> None:
    features, labels = draw()
    lengths = 2.0 ** torch.arange(-12, 12).double()[:, None]
    got, wanted = (run(f, labels, backend, gallery) for f in (features * lengths, features))
    got["d_features"] *= lengths
    for name, value in wanted.items():
        assert relative_error(got[name], value) <= EXACT, name


@gallery_or_not
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_the_features_is_saved_for_the_backward(dtype: torch.dtype, gallery: bool, backend: str) -> None:
    n, d = 24, 64
    features, labels = torch.randn(n, d).to(dtype).requires_grad_(), torch.arange(n) % 4
    other = torch.randn(n, d).to(dtype).requires_grad_()
    given = {features.data_ptr(), other.data_ptr()}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    mined_in = {"gallery": other, "gallery_labels": labels} if gallery else {}
    with saved_tensors_hooks(record, lambda tensor: tensor):
        loss = rru_fast.batch_hard_triplet(features, labels, **mined_in, metric="cosine", backend=backend)
    assert given & saved.keys() == (given if gallery else {features.data_ptr()})
    assert sum(size for pointer, size in saved.items() if pointer not in given) <= 8 * 6 * n < features.nbytes
    loss.backward()
    assert features.grad is not None and features.grad.any()


@gallery_or_not
@every_backend
def test_the_gradient_is_orthogonal_to_the_features(gallery: bool, backend: str) -> None:
    features, labels = draw()
    gradient = run(features, labels, backend, gallery)["d_features"]
    assert (gradient * features).sum(-1).abs().max() < 1e-12 < gradient.abs().max()
