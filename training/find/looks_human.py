"""A check that given crops show a person at all, by the score of OpenCV's HOG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.data.tracklets import Frame, read_pixels
from training.find.detection import load_cv2

LEAST = -1.25
"""Score of the best crop below which they are refused. Of the boxes in every 15th frame of PETS 2009, 1 of 300 of a
person scores below it, and 81 % of 365 that are of nobody."""
CROPS = 8  # are looked at
_HEIGHTS = (88, 96, 104, 112)  # of the person in the detector's window
_WINDOW = (128, 64)


def best_score(crops: Sequence[Frame]) -> float:
    """Return the highest score of some of the crops, each taken for one person who fills it.

    Raises:
        UserError: OpenCV is missing, or a crop cannot be read.
    """
    cv2 = load_cv2()
    places = sorted({round(place) for place in np.linspace(0, len(crops) - 1, min(CROPS, len(crops)))})
    return max(_score(cv2, read_pixels(crops[place])) for place in places)


def _score(cv2: Any, crop: np.ndarray) -> float:
    hog = cv2.HOGDescriptor()
    svm = np.ravel(cv2.HOGDescriptor_getDefaultPeopleDetector())
    scores = []
    for height in _HEIGHTS:
        width = max(1, round(crop.shape[1] * height / crop.shape[0]))
        person = cv2.resize(np.ascontiguousarray(crop[:, :, ::-1]), (width, height))
        person = person[:, max(0, width - _WINDOW[1]) // 2 :][:, : _WINDOW[1]]
        above, left = (_WINDOW[0] - height) // 2, (_WINDOW[1] - person.shape[1]) // 2
        rest = (above, _WINDOW[0] - height - above), (left, _WINDOW[1] - person.shape[1] - left), (0, 0)
        window = np.pad(person, rest, mode="edge")
        scores.append(float(np.ravel(hog.compute(window)) @ svm[:-1] + svm[-1]))
    return max(scores)
