from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from training.retrieval.exact import nearest
from training.retrieval.faiss_index import Index
from training.retrieval.feature_file import FeatureFile, open_features, write_features
from training.runtime.errors import UserError


def clusters(rows: int) -> Tensor:
    """Features of people seen 20 times each."""
    return torch.randn(rows // 20, 32).repeat_interleave(20, 0) + 0.3 * torch.randn(rows, 32)


def file_of(features: Tensor, path: Path) -> FeatureFile:
    rows = len(features)
    path.unlink(missing_ok=True)
    write_features(path, features, [0] * rows, [0] * rows, [""] * rows, {})
    return open_features(path)


def test_most_of_the_nearest_are_found_and_all_in_a_small_gallery(tmp_path: Path) -> None:
    features = clusters(20_000)
    gallery = file_of(features, tmp_path / "gallery.safetensors")
    queries = features[::1000] + 0.3 * torch.randn(20, 32)
    similarity, rows = Index(gallery, print).nearest(queries, 10)
    exact, wanted = nearest(queries, gallery, 10, torch.device("cpu"))
    assert np.mean([np.isin(*pair).mean() for pair in zip(wanted, rows, strict=True)]) > 0.9
    assert (np.diff(similarity) <= 0).all()
    np.testing.assert_allclose(similarity[:, 0], exact[:, 0], atol=1e-5)
    small = file_of(features[:9], tmp_path / "small.safetensors")
    _, rows = Index(small, print).nearest(queries, 9)
    assert np.array_equal(rows, nearest(queries, small, 9, torch.device("cpu"))[1])


def test_an_index_is_kept_and_built_again_for_another_gallery_only(tmp_path: Path) -> None:
    path, built = tmp_path / "[a].safetensors", list[str]()
    gallery = file_of(clusters(2000), path)
    for _ in range(2):
        Index(gallery, built.append)
    assert len(built) == 1
    (first,) = tmp_path.glob("*.ivf")
    assert built[0].endswith(f"index of 2000 features: {first}")
    (tmp_path / "other.safetensors.0123456789abcdef.ivf").touch()
    Index(file_of(clusters(2000), path), built.append)
    assert len(built) == 2
    assert not first.exists()  # of what the gallery no longer holds
    assert len(list(tmp_path.glob("*.ivf"))) == 2  # another gallery's stays


def test_progress_counts_to_the_end(tmp_path: Path, counted: list[tuple[str, float, float | None, str]]) -> None:
    gallery = file_of(clusters(2000), tmp_path / "gallery.safetensors")
    Index(gallery, print).nearest(torch.randn(7, 32), 3)
    nearest(torch.randn(7, 32), gallery, 3, torch.device("cpu"))
    assert [(work, unit) for work, _, _, unit in counted] == [
        ("Hashing the gallery", "MiB"),
        ("Reading the gallery", "features"),
        ("Clustering the features", ""),
        ("Filling the index", "features"),
        ("Searching the index", "queries"),
        ("Searching the gallery", "features"),
    ]
    assert all(done == total for _, done, total, _ in counted if total is not None)


def test_an_index_that_was_cut_short_or_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    gallery = file_of(clusters(200), tmp_path / "gallery.safetensors")
    Index(gallery, print)
    (path,) = tmp_path.glob("*.ivf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{path}: not a readable index \(.+\), remove it$") as raised:
        Index(gallery, print)
    assert "\n" not in str(raised.value)
    path.unlink()
    (tmp_path / f"{path.name}.new").mkdir()
    with pytest.raises(UserError, match=rf"^output: {path}: Is a directory$"):
        Index(gallery, print)


def test_an_index_of_other_features_is_one_line(tmp_path: Path) -> None:
    gallery = file_of(clusters(200), tmp_path / "gallery.safetensors")
    Index(gallery, print)
    (path,) = tmp_path.glob("*.ivf")
    for other in (faiss.index_factory(32, "Flat"), faiss.index_factory(7, "IVF2,Flat")):
        faiss.write_index(other, str(path))
        with pytest.raises(
            UserError, match=rf"^{path}: got an index of 0 features of \d+ numbers, wanted one in lists of"
        ):
            Index(gallery, print)
