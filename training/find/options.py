"""Options of `python -m training.find`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.engine.feature_extractor import PRETRAINED
from training.find.detection import DetectorName
from training.runtime.device import Device
from training.runtime.errors import UserError


@dataclass
class Options:
    """Find a person in a video: when they are seen, how similar they look, a picture and a video of it.

    Without --person everybody is listed, with the numbers of their tracks, to choose one from. Boxes of people come
    from a file in MOTChallenge's form next to the video (gt.txt, or the video's name with .txt) or given; otherwise
    people are detected and tracked, and the boxes are written to tracks.txt, for the next search.
    """

    video: Path
    """A video, or the folder of a MOTChallenge sequence."""
    output: Path
    """A new folder for matches.csv, matches.png and matches.mp4, or people.csv and people.png."""
    person: tuple[str, ...] | None = None
    """The person to find: a folder of crops or several images, in order of time; or tracks of this video, by their
    numbers."""
    checkpoint: Path = PRETRAINED
    """Folder of a run, of a checkpoint or of a network to share; if not given, the small one that comes with this
    repository."""
    detections: Path | None = None
    """File of boxes, in MOTChallenge's form; boxes of track -1 are tracked."""
    detector: DetectorName = "auto"
    """Detector where there are no boxes: torchvision's, or OpenCV's HOG, also where torchvision's weights cannot be
    fetched."""
    detector_weights: Path | None = None
    """File of the weights of torchvision's fasterrcnn_mobilenet_v3_large_fpn, where they cannot be fetched."""
    every: int = 1
    """Look at every Nth frame only; the others are decoded and dropped."""
    min_frames: int = 8
    """Leave out tracks of fewer frames."""
    top: int = 10
    """Number of matches, at most."""
    threshold: float | None = None
    """Least score of a match, from -1 to 1."""
    any_crop: bool = False
    """Do not check that the crops show a person."""
    device: Device = "auto"
    """The device to compute on."""

    def check(self) -> None:
        """Raise a UserError where a value is out of range, or does not go with another."""
        for name in ("every", "min_frames", "top"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise UserError(f"threshold: got {self.threshold}, wanted a cosine, from -1 to 1")
        if self.threshold is not None and self.person is None:
            raise UserError("threshold: got one without --person, wanted both")
        if self.detections is not None and (self.detector != "auto" or self.detector_weights is not None):
            raise UserError("detections: got a file and a detector, wanted one of the two")
