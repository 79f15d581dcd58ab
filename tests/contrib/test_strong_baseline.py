"""contrib.strong_baseline.TripletLoss against the family's loss as its users have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rru_fast.contrib.strong_baseline import TripletLoss
from tests import parity


def family_loss(
    features: Tensor, labels: Tensor, margin: float | None, hard_factor: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if normalize:
        features = features / (features.norm(dim=1, keepdim=True) + 1e-12)
    square = features.square().sum(1)
    distances = (square[:, None] + square - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    same = labels.view(-1, 1) == labels.view(1, -1)
    dist_ap = distances.masked_fill(~same, -torch.inf).max(1).values * (1 + hard_factor)
    dist_an = distances.masked_fill(same, torch.inf).min(1).values * (1 - hard_factor)
    ones = torch.ones_like(dist_an)
    if margin is None:
        return torch.nn.SoftMarginLoss()(dist_an - dist_ap, ones), dist_ap, dist_an
    return torch.nn.MarginRankingLoss(margin)(dist_an, dist_ap, ones), dist_ap, dist_an


@pytest.mark.parametrize("backend", parity.BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("hard_factor", [0.0, 0.1])
@pytest.mark.parametrize("margin", [None, 0.0, 0.3])
def test_loss_distances_and_gradients_are_the_familys(
    margin: float | None, hard_factor: float, normalize: bool, backend: str
) -> None:
    torch.manual_seed(0)
    labels = torch.arange(16) // 4
    features = torch.randn(16, 5, dtype=torch.float64) + 3 * torch.randn(4, 5, dtype=torch.float64)[labels]
    found = []
    for compute in (
        lambda f: TripletLoss(margin, hard_factor, backend=backend)(f, labels, normalize_feature=normalize),
        lambda f: family_loss(f, labels, margin, hard_factor, normalize),
    ):
        leaf = features.clone().requires_grad_()
        loss, dist_ap, dist_an = compute(leaf)
        (loss + 0.1 * dist_ap.square().mean() - 0.2 * dist_an.mean()).backward()
        found.append((loss, dist_ap, dist_an, leaf.grad))
    for got, wanted in zip(*found, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_of_any_length_are_normalized_in_their_dtype(dtype: torch.dtype, length: float) -> None:
    torch.manual_seed(0)
    labels = torch.arange(16) // 4
    features = torch.randn(16, 64, dtype=torch.float64)
    features = (features * (length / features.norm(dim=1, keepdim=True))).to(dtype)
    found = []
    for leaf in (features.clone().requires_grad_(), features.double().requires_grad_()):
        loss, _, _ = TripletLoss(0.3)(leaf, labels, normalize_feature=True)
        (100 * loss).backward()  # gradients that float16 resolves at every length
        assert leaf.grad is not None
        found.append((loss.detach().double(), leaf.grad.double()))
    (loss, gradient), (wanted, wanted_gradient) = found
    rounding = torch.finfo(dtype).eps
    assert abs(loss - wanted) <= rounding
    assert (gradient - wanted_gradient).norm() <= 2 * rounding * wanted_gradient.norm()


@pytest.mark.parametrize(
    "labels",
    [torch.arange(12) // 3 + 0.5, torch.arange(12) // 6 == 1, (torch.arange(12) // 3)[:, None], torch.zeros(12) - 0.0],
    ids=["float", "bool", "column", "zeros"],
)
def test_labels_of_any_kind_are_compared_by_value(labels: Tensor) -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 5, dtype=torch.float64)
    _, codes = labels.flatten().unique(return_inverse=True)
    for got, wanted in zip(TripletLoss(0.3)(features, labels), TripletLoss(0.3)(features, codes), strict=True):
        assert torch.equal(got, wanted)


def test_zero_and_minus_zero_are_one_identity() -> None:
    features, signs = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, -0.0, 1.0])
    _, dist_ap, _ = TripletLoss(0.3)(features, signs)
    assert dist_ap[:2].tolist() == [1.0, 1.0]


def test_under_autocast_gradients_survive_a_large_scale() -> None:
    torch.manual_seed(0)
    leaf = torch.randn(12, 5, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss, dist_ap, _ = TripletLoss(0.3)(leaf, torch.arange(12) // 3)
    assert loss.dtype == dist_ap.dtype == torch.float32
    (loss * 2.0**16).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_it_shows_its_options() -> None:
    assert repr(TripletLoss(hard_factor=0.1)) == "TripletLoss(margin=None, hard_factor=0.1, backend='auto')"
