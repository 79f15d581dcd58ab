"""Hardest positives and negatives of `batch_hard_triplet` on every backend, against the definition and fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rru_fast
from rru_fast.testing import relative_error
from tests import parity
from tests.ops.test_batch_hard import every_backend, random_batch, run


def by_definition(f: Tensor, labels: Tensor, margin: float) -> tuple[list[float], list[int], list[int]]:
    """Eq. 8 for one group, anchor by anchor; ties go to the lowest index."""
    losses, positives, negatives = [], [], []
    for a in range(len(f)):
        distance = [max(float((f[a] - f[b]).square().sum()), 1e-12) ** 0.5 for b in range(len(f))]
        same = [bool(labels[a] == labels[b]) for b in range(len(f))]
        positive = max((b for b in range(len(f)) if same[b]), key=lambda b: (distance[b], -b))
        others = [b for b in range(len(f)) if not same[b]]
        negative = min(others, key=lambda b: (distance[b], b)) if others else -1
        losses.append(max(0.0, margin + distance[positive] - distance[negative]) if others else 0.0)
        positives.append(positive)
        negatives.append(negative)
    return losses, positives, negatives


@every_backend
def test_partners_have_the_right_identity_where_distances_overflow(backend: str) -> None:
    far = run(torch.tensor([[0.0], [1.0], [1e20]]), torch.tensor([0, 0, 1]), backend, reduction="none")
    assert far["loss"][:2].tolist() == [0.0, 0.0] and far["loss"][2].isnan()
    assert far["positive"][:2].tolist() == [1, 0] and far["negative"][:2].tolist() == [2, 2]
    features = torch.tensor([[0.0, 0.0], [1.0, 1.5e19], [3.0, 1.5e19], [2.0, 0.0]])
    assert run(features, torch.tensor([0, 1, 2, 0]), backend)["positive"].tolist() == [3, 1, 2, 0]


def assert_hardest(features: Tensor, labels: Tensor, backend: str, first: int = 0) -> None:
    """Assert that partners of the anchors from `first` on are hardest, by fp64 distances from differences."""
    _, positive, negative = rru_fast.batch_hard_triplet(features, labels, return_indices=True, backend=backend)
    d2 = (features.double()[:, None] - features.double()).square().sum(-1)
    same = labels[:, None] == labels
    hardest = d2.masked_fill(~same, 0).amax(1), d2.masked_fill(same, float("inf")).amin(1)
    for partner, wanted in zip((positive, negative), hardest, strict=True):
        found = d2.gather(1, partner[:, None])[:, 0]
        torch.testing.assert_close(found[first:], wanted[first:], rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("outlier", [0.0, 100.0])
@pytest.mark.parametrize("own", [1.0, 0.03, 0.001])
def test_partners_are_right_under_a_large_common_vector(
    own: float, outlier: float, dtype: torch.dtype, backend: str
) -> None:
    if dtype == torch.float16 and (backend == "reference" or own == 0.001):
        pytest.skip("the reference computes in float16; or float16 resolves only the common vector")
    n = 128 if backend in parity.COMPILED else 64
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        common = torch.randn(48, generator=g, dtype=torch.float64)
        features = (common + own * torch.randn(n, 48, generator=g, dtype=torch.float64)).to(dtype)
        features[0] += outlier
        labels = torch.arange(n) // 4
        assert_hardest(features, labels, backend)


@every_backend
@pytest.mark.parametrize("dark", [0.03, 0.001])
def test_partners_of_dark_clips_are_right_in_a_batch_with_bright_ones(dark: float, backend: str) -> None:
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(32, 256, generator=g).relu()
        features[4:12] = dark * torch.rand(8, 256, generator=g)
        assert_hardest(features, torch.arange(32) // 4, backend)


@every_backend
@pytest.mark.parametrize("own", [0.03, 0.001])
def test_a_blank_clip_does_not_hide_the_common_vector(own: float, backend: str) -> None:
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(48, generator=g) + own * torch.randn(64, 48, generator=g)
        features[:2] = 0
        assert_hardest(features, torch.arange(64) // 4, backend, first=2)


@every_backend
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_common_vector_does_not_enter_the_gradient(metric: str, backend: str) -> None:
    features, labels = random_batch((2, 33, 24))
    features = (10 + 0.1 * features).float()
    got, oracle = (
        run(features, labels, backend, metric=metric),
        run(features.double(), labels, "reference", metric=metric),
    )
    in_dtype = run(features, labels, "reference", metric=metric)
    for name in ("loss", "d_features"):
        allowed = 2 * relative_error(in_dtype[name], oracle[name]) + torch.finfo(torch.float32).eps
        assert relative_error(got[name], oracle[name]) <= allowed, name
    if metric == "euclidean":
        assert relative_error(got["d_features"], oracle["d_features"]) <= 1e-5


@every_backend
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9),
    identities=st.integers(1, 4),
    margin=st.sampled_from([0.0, 0.5, 3.0]),
    data=st.data(),
)
def test_small_integer_points_match_the_definition_including_ties(
    backend: str, values: list[tuple[int, int]], identities: int, margin: float, data: st.DataObject
) -> None:
    # Distances between integer points are exact, so ties are real ties.
    labels = torch.tensor(data.draw(st.lists(st.integers(1, identities), min_size=len(values), max_size=len(values))))
    f = torch.tensor(values, dtype=torch.float32)
    loss, positive, negative = rru_fast.batch_hard_triplet(
        f, labels, margin=margin, reduction="none", return_indices=True, backend=backend
    )
    losses, positives, negatives = by_definition(f, labels, margin)
    assert positive.tolist() == positives
    assert negative.tolist() == negatives
    assert loss.tolist() == pytest.approx(losses, abs=3e-6)


@every_backend
def test_the_first_nan_is_the_partner_and_gradients_are_nan(backend: str) -> None:
    features, labels = random_batch((1, 100, 6))
    features[0, 50], features[0, 80] = float("nan"), float("nan")
    labels[50], labels[80] = 1, 2
    got, wanted = run(features, labels, backend), run(features, labels, "reference")
    assert torch.equal(got["positive"], wanted["positive"])
    assert torch.equal(got["negative"], wanted["negative"])
    assert {50, 80} == set(got["negative"][0, :50].tolist())
    assert got["d_features"].isnan().all()
