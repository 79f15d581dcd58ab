from __future__ import annotations

import sys
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection import FasterRCNN_MobileNet_V3_Large_FPN_Weights as Weights
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

from training.data.datasets.mot_boxes import read_boxes
from training.data.footage import open_footage
from training.find.boxes import DetectedBoxes
from training.find.detection import Detector, HogDetector, TorchvisionDetector, make_detector
from training.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Weights of torchvision's detector, in its form, of which no image needs more than a few boxes."""
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    return model.state_dict()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the download fail, as where there is no network."""

    def fail(*_: Any, **__: Any) -> None:
        raise HTTPException("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


def make(name: Any, file: Path | None = None) -> tuple[Detector, list[str]]:
    lines: list[str] = []
    return make_detector(name, file, CPU, lines.append), lines


def test_hog_serves_where_weights_cannot_be_had_and_says_so(offline: None) -> None:
    detector, lines = make("auto")
    assert isinstance(detector, HogDetector)
    assert lines == [
        "no weights for torchvision's detector (no network): people are detected by OpenCV's HOG, which finds fewer; "
        "--detections FILE takes boxes of your own"
    ]
    with pytest.raises(
        UserError, match=r"^detector: no weights .*; wanted them as --detector-weights, --detector hog,"
    ):
        make("torchvision")
    assert make("hog")[1] == []


@pytest.mark.parametrize("name", ["auto", "torchvision"])
def test_weights_of_a_file_are_torchvisions(tmp_path: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    torch.save(weights, tmp_path / "weights.pth")
    detector, lines = make(name, tmp_path / "weights.pth")
    assert isinstance(detector, TorchvisionDetector) and lines == []
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"^weights: .*other.pth does not fit this network: 1 unknown \(a\); "):
        make(name, tmp_path / "other.pth")


def test_downloaded_weights_are_used(monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]) -> None:
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **_: asked.append(url) or weights
    )
    detector, lines = make("auto")
    assert isinstance(detector, TorchvisionDetector) and lines == []
    assert asked == [Weights.COCO_V1.url]


def test_only_people_of_torchvisions_classes_are_returned(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = TorchvisionDetector(weights, "test", CPU)
    frame = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    found = detector(frame)
    assert found.boxes.shape == (len(found.scores), 4)
    given = {
        "labels": torch.tensor([3, 1, 1]),
        "boxes": torch.tensor([[0.0, 0, 9, 9], [1, 2, 30, 40], [5, 6, 7, 8]]),
        "scores": torch.tensor([0.9, 0.8, 0.1]),
    }
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(detector._model, "forward", lambda images: seen.extend(images) or [given])
    found = detector(frame)
    assert found.boxes.tolist() == [[1, 2, 30, 40], [5, 6, 7, 8]]
    np.testing.assert_allclose(found.scores, [0.8, 0.1], atol=1e-7)
    assert torch.equal(seen[0] * 255, torch.from_numpy(frame).permute(2, 0, 1).float())


@pytest.mark.parametrize("size", [(10, 10), (20, 600), (600, 20)])
def test_an_image_smaller_than_a_person_has_nobody(size: tuple[int, int]) -> None:
    found = HogDetector()(np.zeros((*size, 3), np.uint8))
    assert (found.boxes.shape, found.scores.shape) == ((0, 4), (0,))


@pytest.mark.shared
def test_hog_finds_most_people_of_pets(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "pets09-s2l1"
    wanted, _ = read_boxes(folder / "gt.txt", None)
    detector, hits, boxes, detections = HogDetector(), 0, 0, 0
    for frame in open_footage(folder / "PETS09-S2L1.avi").frames():
        if frame.number % 40:
            continue
        found = detector(frame.pixels)
        detections += len(found.boxes)
        left = list(range(len(found.boxes)))
        for box in wanted[frame.number]:
            boxes += 1
            a = np.array([box.left - 1, box.top - 1, box.left - 1 + box.width, box.top - 1 + box.height])
            for row in left:
                b = found.boxes[row]
                inner = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
                if inner / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner) >= 0.5:
                    hits += 1
                    left.remove(row)
                    break
    assert boxes > 100
    assert hits / boxes > 0.8 and hits / detections > 0.8


@pytest.mark.parametrize("library", ["cv2", "trackers", "supervision"])
def test_a_library_that_is_not_there_is_one_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"^{library}: not usable here \(.*\), wanted: pip install '\.\[find\]'$"):
        DetectedBoxes(HogDetector(), 10)


def test_an_opencv_without_hog_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0.0"))
    with pytest.raises(UserError, match=r"^cv2: got OpenCV 5.0.0, which has no HOG, wanted: pip install '\.\[find\]'$"):
        HogDetector()
