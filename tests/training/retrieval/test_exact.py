from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness.measure import peak_bytes
from training.retrieval import exact as module
from training.retrieval.exact import nearest
from training.retrieval.feature_file import FeatureFile, open_features, write_features

CPU = torch.device("cpu")


def file_of(features: Tensor, path: Path) -> FeatureFile:
    rows = len(features)
    write_features(path, features, [0] * rows, [0] * rows, [""] * rows, {})
    return open_features(path)


def brute_force(queries: Tensor, features: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """By definition, all of them."""
    a, b = queries.double(), features.double()
    similarity = (a[:, None] * b).sum(2) / (a.norm(dim=1)[:, None] * b.norm(dim=1))
    best = similarity.sort(dim=1, descending=True)
    return best.values[:, :count].numpy(), best.indices[:, :count].numpy()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk", [5, 64, 1000])
def test_the_nearest_are_those_by_definition_whatever_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(module, "_NUMBERS", 16 * chunk)
    features = torch.randn(300, 16)
    features *= torch.logspace(-30, 30, 300)[torch.randperm(300)][:, None]  # lengths do not count, nor overflow
    queries = torch.randn(150, 16)  # more than go through at once
    queries[3] = features[200] * 2
    similarity, rows = nearest(queries, file_of(features, tmp_path / "f"), 9, torch.device(device))
    wanted, order = brute_force(queries, features, 9)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(similarity, wanted, rtol=0, atol=1e-12)
    assert rows[3, 0] == 200


@pytest.mark.parametrize("chunk", [3, 50, 1000])
def test_equal_rows_come_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_NUMBERS", 33 * chunk)
    kinds = torch.randn(5, 33)
    which = torch.randint(0, 5, (400,))
    gallery = file_of(kinds[which], tmp_path / "f")
    for queries in (torch.randn(4, 33), kinds):
        similarity, rows = nearest(queries, gallery, 120, CPU)
        for query, found, values in zip(queries, rows, similarity, strict=True):
            best = torch.cosine_similarity(query[None].double(), kinds.double()).argsort(descending=True)
            wanted = torch.cat([(which == kind).nonzero().ravel() for kind in best])[:120]
            assert found.tolist() == wanted.tolist()
            assert len(set(values)) <= 5  # equal rows are equally near, to the last bit


def test_differences_below_float32_decide(tmp_path: Path) -> None:
    base = torch.tensor([1.0, 0.0, 0.0])
    gallery = torch.stack([base + torch.tensor([0.0, 1e-5 * step, 0.0]) for step in (9, 3, 7, 1, 5)])
    _, rows = nearest(base[None], file_of(gallery, tmp_path / "f"), 5, CPU)
    assert rows.tolist() == [[3, 1, 4, 2, 0]]  # their cosines are 1 in float32


def test_a_gallery_ten_times_as_large_needs_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBERS", 32 * 512)
    queries = torch.randn(8, 32)
    small, large = (file_of(torch.randn(rows, 32), tmp_path / str(rows)) for rows in (4096, 40960))
    peak, allowed = (peak_bytes(lambda f=file: nearest(queries, f, 10, CPU), CPU) for file in (large, small))
    assert 0 < peak <= 1.02 * allowed < 40960 * 32 * 4
