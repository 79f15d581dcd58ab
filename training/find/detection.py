"""People detectors: torchvision's, where its weights can be had, or OpenCV's HOG, whose weights come with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch

from training.evaluation.ranking import Floats
from training.model.weights import download, load_weights, read_weights
from training.runtime.command import need
from training.runtime.errors import UserError

DetectorName: TypeAlias = Literal["auto", "torchvision", "hog"]

# HOG finds people about 96 pixels high or more: frames are scaled to this height, by a factor of at most 2.
_HOG_HEIGHT, _HOG_FACTOR = 1152, 2.0
# Share of HOG's window that is margin around the person, on either side, and above and below.
_MARGIN_X, _MARGIN_Y = 0.18, 0.08
_PERSON_LABEL = 1  # in COCO, by which torchvision's detectors were trained


@dataclass(frozen=True)
class Detections:
    """N people in a frame.

    boxes: (N, 4), left, top, right and bottom in pixels, from 0.
    scores: (N,).
    """

    boxes: Floats
    scores: Floats


class Detector(Protocol):
    """Finder of people in a frame.

    name: for messages.
    sure: score from which a detection may begin a track.
    """

    name: str
    sure: float

    def __call__(self, pixels: np.ndarray) -> Detections:
        """Find the people in a frame, (h, w, 3) uint8 RGB."""


def make_detector(
    name: DetectorName, weights: Path | None, device: torch.device, warn: Callable[[str], None]
) -> Detector:
    """Make a detector.

    Args:
        name: "auto" for torchvision's, or HOG, with a warning, where torchvision's weights cannot be fetched.
        weights: file of torchvision's weights; None to fetch them.
        device: where torchvision's computes.
        warn: called with one line.

    Raises:
        UserError: weights cannot be fetched or do not fit, or a library is missing.
    """
    if weights is not None and name == "hog":
        raise UserError(f"detector_weights: got {weights} with detector 'hog', whose weights come with OpenCV")
    if weights is not None:
        return TorchvisionDetector(read_weights(weights), str(weights), device)
    if name == "hog":
        return HogDetector()
    from torchvision.models.detection import FasterRCNN_MobileNet_V3_Large_FPN_Weights as Weights

    state = download(Weights.COCO_V1)
    if not isinstance(state, str):
        return TorchvisionDetector(state, "torchvision's download", device)
    line = f"no weights for torchvision's detector ({state})"
    if name == "torchvision":
        raise UserError(f"detector: {line}; wanted them as --detector-weights, --detector hog, or --detections FILE")
    warn(f"{line}: people are detected by OpenCV's HOG, which finds fewer; --detections FILE takes boxes of your own")
    return HogDetector()


class HogDetector:
    """OpenCV's histograms of oriented gradients with a linear SVM (Dalal and Triggs, CVPR 2005), for upright people."""

    name = "OpenCV's HOG"
    sure = 0.5

    def __init__(self) -> None:
        self._cv2 = load_cv2()
        self._hog = self._cv2.HOGDescriptor()
        self._hog.setSVMDetector(self._cv2.HOGDescriptor_getDefaultPeopleDetector())

    def __call__(self, pixels: np.ndarray) -> Detections:
        """Find the people in a frame, (h, w, 3) uint8 RGB."""
        factor = min(_HOG_FACTOR, _HOG_HEIGHT / pixels.shape[0])
        image = self._cv2.cvtColor(pixels, self._cv2.COLOR_RGB2BGR)
        image = self._cv2.resize(image, None, fx=factor, fy=factor)
        if image.shape[0] < 128 or image.shape[1] < 64:  # smaller than its window
            return Detections(np.zeros((0, 4)), np.zeros(0))
        found, scores = self._hog.detectMultiScale(
            image, winStride=(8, 8), padding=(16, 16), scale=1.1, groupThreshold=2
        )
        left, top, width, height = np.reshape(found, (-1, 4)).T / factor
        edges = (left + _MARGIN_X * width, top + _MARGIN_Y * height)
        ends = (left + (1 - _MARGIN_X) * width, top + (1 - _MARGIN_Y) * height)
        return Detections(np.stack((*edges, *ends), axis=1), np.reshape(scores, -1).astype(np.float64))


class TorchvisionDetector:
    """Torchvision's Faster R-CNN on MobileNetV3, trained on COCO, of which only people are taken.

    Args:
        state: its weights.
        source: their origin, for messages.
        device: where to compute.

    Raises:
        UserError: the weights are of another network.
    """

    name = "torchvision's Faster R-CNN"
    sure = 0.6

    def __init__(self, state: dict[str, torch.Tensor], source: str, device: torch.device) -> None:
        from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

        self._model = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
        load_weights(self._model, state, source)
        self._model.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> Detections:
        """Find the people in a frame, (h, w, 3) uint8 RGB."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device).permute(2, 0, 1) / 255
        (found,) = self._model([image])
        people = found["labels"] == _PERSON_LABEL
        boxes, scores = (found[name][people].double().cpu().numpy() for name in ("boxes", "scores"))
        return Detections(boxes, scores)


def load_cv2() -> Any:
    """Import OpenCV 4.

    Raises:
        UserError: it is missing, or of a version without HOG.
    """
    cv2 = need("cv2", "find")
    if not hasattr(cv2, "HOGDescriptor"):
        raise UserError(f"cv2: got OpenCV {cv2.__version__}, which has no HOG, wanted: pip install '.[find]'")
    return cv2
