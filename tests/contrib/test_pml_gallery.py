"""Embeddings of others as a gallery, `ref_emb`, in `rru_fast.contrib.pml`, against pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_metric_learning import miners
from torch import Tensor

from benchmarks.harness.measure import peak_bytes
from rru_fast.contrib.pml import BatchHardMiner, BatchHardTripletLoss
from rru_fast.testing import relative_error
from tests.contrib.test_pml import TIGHT, assert_equal, batch, distance_of, each_distance, pair
from tests.parity import BACKENDS


def assert_equal_in_both(ours: Any, theirs: Any, embeddings: Tensor, labels: Tensor, *gallery: Tensor) -> None:
    """Compare values, and gradients of embeddings and of the gallery, of which one alone may need them."""
    ref_emb, ref_labels = gallery
    for needed in ((True, True), (True, False), (False, True)):
        found = []
        for loss in (ours, theirs):
            leaves = [v.clone().requires_grad_(need) for v, need in zip((embeddings, ref_emb), needed, strict=True)]
            value = loss(leaves[0], labels, None, leaves[1], ref_labels)
            value.backward()
            found.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
        for got, wanted in zip(*found, strict=True):
            assert got.dtype == wanted.dtype
            assert relative_error(got, wanted) <= TIGHT
        assert found[1][1].any()


@pytest.fixture
def no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where pml would mine from its matrix, but by its own miner."""
    mine = miners.BatchHardMiner.mine

    def refuse(miner: Any, *args: Any) -> Any:
        assert not isinstance(miner, BatchHardMiner)
        return mine(miner, *args)

    monkeypatch.setattr(miners.BatchHardMiner, "mine", refuse)
    monkeypatch.setattr(BatchHardTripletLoss, "_given_losses", None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smooth_loss", [False, True])
@each_distance
def test_a_gallery_without_triplets_is_mined_as_by_pml(
    distance: Any, smooth_loss: bool, backend: str, no_matrix: None
) -> None:
    embeddings, labels = batch()
    gallery = batch(30, seed=1)
    _, theirs = pair(distance=distance, smooth_loss=smooth_loss, margin=0.2)
    ours = BatchHardTripletLoss(0.2, distance=distance(), smooth_loss=smooth_loss, backend=backend)
    assert_equal_in_both(ours, theirs, embeddings, labels, *gallery)
    got = BatchHardMiner(distance=distance(), backend=backend)(embeddings, labels, *gallery)
    wanted = miners.BatchHardMiner(distance=distance())(embeddings, labels, *gallery)
    assert all(map(torch.equal, got, wanted))


@each_distance
def test_anchors_without_a_positive_or_a_negative_in_the_gallery_are_left_out(distance: Any, no_matrix: None) -> None:
    embeddings, labels = batch()
    ref_emb, _ = batch(5, seed=1)
    ours, theirs = pair(distance=distance, margin=0.2)
    for ref_labels in (torch.zeros(5, dtype=torch.int64), torch.full((5,), 99), torch.tensor([0, 0, 1, 99, 99])):
        wanted = miners.BatchHardMiner(distance=distance())(embeddings, labels, ref_emb, ref_labels)
        got = BatchHardMiner(distance=distance())(embeddings, labels, ref_emb, ref_labels)
        assert all(map(torch.equal, got, wanted))
        assert len(got[0]) < len(labels)
        assert_equal(
            lambda e, y=ref_labels: ours(e, labels, None, ref_emb, y),  # type: ignore[misc]
            lambda e, y=ref_labels: theirs(e, labels, None, ref_emb, y),  # type: ignore[misc]
            embeddings,
        )


@pytest.mark.parametrize("apart", [0, 1e-9, 1e-7])
@each_distance
def test_near_partners_in_the_gallery_have_pmls_loss_and_gradient(distance: Any, apart: float, no_matrix: None) -> None:
    embeddings, labels = torch.tensor([[1, 0], [0, 2], [3, 3]], dtype=torch.float64), torch.tensor([0, 1, 2])
    ref_emb, ref_labels = (
        torch.tensor([[1, apart], [0, 2 - apart], [apart, 2], [1, 3]], dtype=torch.float64),
        torch.tensor([0, 1, 0, 2]),
    )
    ours, theirs = pair(distance=distance, margin=0.2)
    assert_equal(
        lambda e: ours(e, labels, None, ref_emb, ref_labels),
        lambda e: theirs(e, labels, None, ref_emb, ref_labels),
        embeddings,
    )


@pytest.mark.parametrize("kinds", [("float", "float"), ("float", "int64"), ("int32", "int64"), ("uint8", "int8")])
def test_labels_of_the_gallery_have_any_dtype(kinds: tuple[str, str], no_matrix: None) -> None:
    (embeddings, labels), (ref_emb, ref_labels) = batch(), batch(30, seed=1)
    dtypes = [getattr(torch, kind) for kind in kinds]
    fractions = 0.5 if kinds == ("float", "float") else 0
    labels, ref_labels = ((y + fractions).to(dtype) for y, dtype in zip((labels, ref_labels), dtypes, strict=True))
    got = BatchHardMiner()(embeddings, labels, ref_emb, ref_labels)
    assert all(map(torch.equal, got, miners.BatchHardMiner()(embeddings, labels, ref_emb, ref_labels)))
    assert len(got[0])


@each_distance
def test_embeddings_under_other_labels_are_a_gallery(distance: Any, no_matrix: None) -> None:
    embeddings, labels = batch()
    same = labels.clone()  # pml then counts an anchor among its positives
    got = BatchHardMiner(distance=distance())(embeddings, labels, embeddings, same)
    wanted = miners.BatchHardMiner(distance=distance())(embeddings, labels, embeddings, same)
    assert len(wanted[0]) == len(embeddings)
    assert all(map(torch.equal, got, wanted))
    ours, theirs = pair(distance=distance, margin=5.0)
    assert_equal(lambda e: ours(e, labels, None, e, same), lambda e: theirs(e, labels, None, e, same), embeddings)


@each_distance
def test_counterparts_under_the_very_same_labels_are_left_out_as_by_pml(distance: Any) -> None:
    embeddings, labels = batch()
    others = embeddings.flip(1)
    got = BatchHardMiner(distance=distance())(embeddings, labels, others, labels)
    assert all(map(torch.equal, got, miners.BatchHardMiner(distance=distance())(embeddings, labels, others, labels)))
    ours, theirs = pair(distance=distance, margin=5.0)
    assert_equal(
        lambda e: ours(e, labels, None, others, labels), lambda e: theirs(e, labels, None, others, labels), embeddings
    )


@each_distance
def test_the_miner_records_pmls_statistics_of_the_gallery(distance: Any) -> None:
    (embeddings, labels), gallery = batch(), batch(30, seed=1)
    ours, theirs = (
        miner(distance=distance_of(distance), collect_stats=True) for miner in (BatchHardMiner, miners.BatchHardMiner)
    )
    ours(embeddings, labels, *gallery)
    theirs(embeddings, labels, *gallery)
    for got, wanted in ((ours, theirs), (ours.distance, theirs.distance)):
        for name in wanted._record_these_stats:
            assert getattr(got, name) == pytest.approx(getattr(wanted, name), rel=TIGHT, abs=0), name


def test_memory_grows_with_the_gallery_not_with_the_matrix() -> None:
    embeddings, ref_emb = torch.randn(4096, 8), torch.randn(16384, 8)
    labels, ref_labels = torch.arange(4096) % 1024, torch.arange(16384) % 1024
    matrix = 4 * len(labels) * len(ref_labels)
    for call in (BatchHardMiner(), BatchHardTripletLoss()):
        extra = (None,) if isinstance(call, BatchHardTripletLoss) else ()
        peak = peak_bytes(
            lambda call=call, extra=extra: call(embeddings, labels, *extra, ref_emb, ref_labels), embeddings.device
        )
        assert peak < matrix / 10
