"""The person to look for: crops, or tracks of the video."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.image_folder import frames_of_folder
from training.data.tracklets import Tracklet, read_pixels
from training.engine.feature_extractor import FeatureExtractor, unit_features
from training.evaluation.ranking import Floats
from training.find.looks_human import LEAST, best_score
from training.runtime.errors import UserError


@dataclass(frozen=True)
class Person:
    """A person, by one of the two.

    crops: image files, in order of time.
    tracks: numbers of tracks of the video.
    """

    crops: tuple[Path, ...] = ()
    tracks: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.tracks:
            return f"track {', '.join(map(str, self.tracks))}"
        if len(self.crops) == 1:
            return str(self.crops[0])
        return f"{len(self.crops)} crops in {self.crops[0].parent}"

    def check_crops(self) -> None:
        """Raise a UserError unless the crops can be read and show somebody."""
        for crop in self.crops:
            read_pixels(crop)
        if self.crops and (score := best_score(self.crops)) < LEAST:
            raise UserError(
                f"person: got {self}, which shows nobody upright (HOG scores it {score:.1f}, people mostly above "
                f"{LEAST}), wanted crops of one person, or --any-crop"
            )

    def check_tracks(self, numbers: Collection[int], video: Path) -> None:
        """Raise a UserError unless the video has these tracks."""
        if absent := [track for track in self.tracks if track not in numbers]:
            some = ", ".join(map(str, sorted(numbers)[:10]))
            raise UserError(f"person: got track {absent[0]}, wanted one of {video}, such as {some}")

    def feature(self, features: Mapping[int, Floats], extractor: FeatureExtractor) -> Floats:
        """Return the feature (D,), of length 1: of several tracks, the mean of theirs.

        Args:
            features: of the video's tracks, by number.
            extractor: of the crops' feature.

        Raises:
            UserError: a crop cannot be read, or a feature is zero.
        """
        name = f"person: {self}"
        if self.tracks:
            each = np.stack([features[track] for track in self.tracks])
        else:
            each = extractor.extract([Tracklet(-1, -1, self.crops, name)])
        mean = unit_features(each, [name] * len(each)).mean(0, keepdims=True)
        unit: Floats = unit_features(mean, [name])[0]
        return unit


def read_person(given: Sequence[str]) -> Person:
    """Read the values of --person: numbers of tracks, a folder of crops, or images.

    Raises:
        UserError: a path is not there, or a folder holds no image.
    """
    if not given:
        raise UserError("person: got nothing, wanted a folder of crops, images, or numbers of tracks")
    if all(text.isascii() and text.isdecimal() and len(text) <= 18 for text in given):
        return Person(tracks=tuple(dict.fromkeys(map(int, given))))
    paths = [Path(text) for text in given]
    if len(paths) == 1 and paths[0].is_dir():
        return Person(frames_of_folder(paths[0], "person"))
    for path in paths:
        if not path.is_file():
            raise UserError(f"person: there is no {path}, wanted a folder of crops, images, or numbers of tracks")
    return Person(tuple(paths))
