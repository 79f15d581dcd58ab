from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from training.retrieval.feature_file import open_features, write_features
from training.runtime.errors import UserError

FEATURES = torch.arange(1.0, 15.0).view(7, 2)
NAMES = ["cam1/person001", "with\nnewline", "with ü", "", "e", "f", "g"]


def write(path: Path, **changes: Any) -> Path:
    content = {"features": FEATURES, "people": list(range(7)), "cameras": [1] * 7, "names": NAMES, "about": {"a": "b"}}
    write_features(path, **{**content, **changes})
    return path


def test_what_was_written_is_read_in_parts(tmp_path: Path) -> None:
    file = open_features(write(tmp_path / "file.safetensors", features=FEATURES.double().numpy()))
    assert (file.rows, file.width, file.about) == (7, 2, {"a": "b"})
    assert (file.people, file.cameras, file.names) == (list(range(7)), [1] * 7, NAMES)
    for rows in (1, 3, 7, 100):
        parts = list(file.chunks(rows))
        assert [start for start, _ in parts] == list(range(0, 7, rows))
        assert torch.equal(torch.cat([part for _, part in parts]), FEATURES)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_feature_without_a_direction_is_named(tmp_path: Path, value: float) -> None:
    features = FEATURES.clone()
    features[5] = value
    file = open_features(write(tmp_path / "file.safetensors", features=features))
    with pytest.raises(UserError, match=r"file\.safetensors: the feature of f \(row 5\) is zero or not finite"):
        list(file.chunks(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": None}, "got no people, wanted a file of `python -m training.export features`"),
        ({"features": FEATURES.double()}, "features: got dtype F64, wanted F32"),
        ({"features": FEATURES[0]}, r"features: got shape \(2,\), wanted \(tracklets, D\)"),
        ({"features": FEATURES[:0]}, r"features: got shape \(0, 2\), wanted"),
        ({"cameras": torch.ones(6, dtype=torch.int64)}, r"cameras: got shape \(6,\), wanted \(7,\), one a tracklet"),
        (
            {"names": torch.tensor(list(b'["a"]'), dtype=torch.uint8)},
            "names: got 1 of them, wanted a list of 7, one a tracklet",
        ),
        (
            {"names": torch.tensor(list(b'["a", 1, "", "", "", "", ""]'), dtype=torch.uint8)},
            "names: got 1, wanted strings",
        ),
        ({"names": torch.tensor(list(b"cam1"), dtype=torch.uint8)}, "names: got invalid JSON"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {**safetensors.torch.load_file(write(tmp_path / "whole.safetensors")), **changes}
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=f"^{path}: {message}") as raised:
        assert open_features(path).names
    assert "\n" not in str(raised.value)


def test_a_file_that_is_absent_cut_short_or_no_safetensors_is_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-9])
    (tmp_path / "other").write_text("not one")
    for path in (tmp_path / "cut", tmp_path / "other", tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=rf"^{path}: not a readable file of features \(.+\)$") as raised:
            open_features(path)
        assert "\n" not in str(raised.value)
