"""Features of frames, tracklets and videos, by a trained network, from Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data.datasets.mot_boxes import Box, last_frames, read_boxes
from training.data.footage import open_footage
from training.data.image_folder import frames_of_folder
from training.data.resizing import Resize
from training.data.tracklets import Frame, Tracklet, pixels_of
from training.engine.checkpoint import Checkpoint, load
from training.engine.load_trained import load_network, provenance
from training.engine.run_record import options_of
from training.evaluation.feature_stream import FeatureStream
from training.evaluation.features import CHUNK, extract
from training.evaluation.ranking import Floats
from training.model.network import Network
from training.model.operators import Ops
from training.runtime.device import Device, choose_device
from training.runtime.errors import UserError

PRETRAINED = Path(__file__).parents[1] / "pretrained" / "tiny"
"""The network that comes with this repository; its README says what it can do and what it cannot."""

ImageLike: TypeAlias = "str | Path | Image.Image | np.ndarray"
"""An image: a file, a Pillow image, or an (h, w, 3) uint8 RGB array."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class FeatureExtractor:
    """A trained network that turns tracklets of any length into vectors to compare by their cosine.

        extractor = FeatureExtractor("runs/...")
        one = extractor(["0001.png", "0002.png"])  # (D,), of length 1
        similarity = one @ extractor(folder)

    Frames are given in order of time: the network is recurrent. A long tracklet is processed chunk by chunk.

    Args:
        checkpoint: folder of a run, of a checkpoint or of a network to share; or a `Network`, such as one by
            `Network.from_pretrained`, which is copied and runs its own operators.
        device: "auto", "cpu" or "cuda".
        dtype: the network computes in: float32, float64, bfloat16 or float16.
        ops: the library's operators ("fast") or plain PyTorch ("reference"); None for those it was trained with.
        resize: resize frames on the "device" or by "pillow"; None for as in training.
        chunk: frames per forward pass.

    Attributes:
        network: in eval mode.
        features: D, numbers per feature.

    Raises:
        UserError: there is no usable network, no such device or dtype, or an argument is out of range.
    """

    def __init__(
        self,
        checkpoint: str | Path | Network = PRETRAINED,
        *,
        device: Device = "auto",
        dtype: torch.dtype = torch.float32,
        ops: Ops | None = None,
        resize: Resize | None = None,
        chunk: int = CHUNK,
    ) -> None:
        choices = {"device": get_args(Device), "dtype": DTYPES, "ops": (None, *get_args(Ops))}
        choices["resize"] = (None, *get_args(Resize))
        for name, value in (("device", device), ("dtype", dtype), ("ops", ops), ("resize", resize)):
            if value not in choices[name]:
                raise UserError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, choices[name]))}")
        if not isinstance(chunk, int) or chunk < 1:
            raise UserError(f"chunk: got {chunk!r}, wanted at least 1 frame")
        chosen = choose_device(device)
        self._saved: Checkpoint | None = None
        own: Resize = "device"
        if isinstance(checkpoint, Network):
            if ops is not None:
                raise UserError(f"ops: got {ops!r} with a network, wanted None: it runs its own operators")
            network = copy.deepcopy(checkpoint)
        else:
            self._saved = load(Path(checkpoint))
            network = load_network(self._saved, ops, chosen)
            own = options_of(self._saved.config).get("resize", own)
        self.network = network.to(chosen, dtype).eval()
        self.features: int = self.network.head.features
        self.chunk, self.resize = chunk, resize or own

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """Origin of the network's features, as `training.export` records it; empty for a network given as such."""
        if self._saved is None:
            return {}
        return provenance(self._saved, next(self.network.parameters()).device)

    def __call__(
        self, frames: str | Path | Iterable[ImageLike], boxes: Iterable[Sequence[float]] | None = None
    ) -> Tensor:
        """Extract the feature of one tracklet.

        Args:
            frames: images in order of time, an (N, h, w, 3) uint8 array of them, or a folder of images, taken in
                natural order of their names; with `boxes`, a video or the folder of a MOTChallenge sequence.
            boxes: rows of frame number (from 1), left, top, width and height in pixels, left and top from 1, as in
                MOTChallenge's files; one per frame.

        Returns:
            (D,) float32 on the CPU, of length 1.

        Raises:
            UserError: a frame cannot be read, a box is malformed or outside of the video, or the feature is zero.
        """
        if boxes is not None:
            if not isinstance(frames, str | Path):
                raise UserError(f"frames: got {type(frames).__name__} with boxes, wanted the path of a video")
            return self._of_video(Path(frames), _by_frame(boxes))[0]
        return self.batch([frames])[0]

    def batch(self, tracklets: Iterable[str | Path | Iterable[ImageLike]]) -> Tensor:
        """Extract the features of N tracklets, short ones several at a time.

        Args:
            tracklets: each as `__call__` takes frames.

        Returns:
            (N, D) float32 on the CPU, each of length 1.

        Raises:
            UserError: there is no tracklet, a frame cannot be read, or a feature is zero.
        """
        given = [_tracklet(frames, number) for number, frames in enumerate(tracklets)]
        if not given:
            raise UserError("tracklets: got none, wanted at least one")
        return _unit(self.extract(given), [tracklet.name for tracklet in given])

    def tracks(self, video: str | Path, boxes: str | Path) -> dict[int, Tensor]:
        """Extract the features of all tracks of a video, in the memory of one chunk and a state per open track.

        Args:
            video: a video, or the folder of a MOTChallenge sequence.
            boxes: a file of boxes as MOTChallenge's: frame, track, left, top, width, height, confidence.

        Returns:
            (D,) float32 on the CPU, of length 1, by track.

        Raises:
            UserError: the video or the boxes cannot be read, do not go together, or a feature is zero.
        """
        return self._of_video(Path(video), read_boxes(Path(boxes), None)[0])

    def extract(self, tracklets: Sequence[Tracklet]) -> Floats:
        """Extract the features of tracklets as the network has them, (N, D) float64, not of length 1.

        Raises:
            UserError: a frame cannot be read, or a feature is not finite.
        """
        return extract(self.network, tracklets, self.chunk, self.resize)

    def stream(self) -> FeatureStream:
        """Return a new stream of the network's features, for tracks that grow frame by frame."""
        return FeatureStream(self.network, self.chunk, self.resize)

    def _of_video(self, video: Path, boxes: Mapping[int, Sequence[Box]]) -> dict[int, Tensor]:
        """Extract the features of the tracks of boxes by frame number."""
        if not boxes:
            raise UserError(f"boxes: got none, wanted boxes of people in {video}")
        last = last_frames(boxes)
        stream, number, end = self.stream(), 0, max(boxes)
        for number, _, pixels in open_footage(video).frames():
            for box in boxes.get(number, ()):
                crop = box.crop(pixels)
                if crop.size == 0:
                    raise UserError(f"boxes: {box} of frame {number} is outside of the image of {video}")
                stream.add(box.track, crop)
                if last[box.track] == number:
                    stream.end(box.track)
            if number == end:
                break
        if min(boxes) < 1 or end > number:
            raise UserError(f"boxes: got frames {min(boxes)} to {end}, but {video} has {number}")
        features = stream.finish()
        units = _unit(np.stack(list(features.values())), [f"track {track}" for track in features])
        return dict(zip(features, units, strict=True))


def unit_features(features: Floats, names: Sequence[str]) -> Floats:
    """Divide features (N, D) by their lengths.

    Raises:
        UserError: one is zero and has no direction; it is named.
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    for name, length in zip(names, lengths, strict=True):
        if not length:
            raise UserError(f"{name}: its feature is zero and has no direction")
    units: Floats = features / lengths
    return units


def _unit(features: Floats, names: Sequence[str]) -> Tensor:
    return torch.from_numpy(unit_features(features, names)).float()


def _by_frame(rows: Iterable[Sequence[float]]) -> dict[int, list[Box]]:
    """Return boxes of track 0 by their frames."""
    boxes: dict[int, list[Box]] = {}
    wanted = "wanted rows of frame, left, top, width, height, one per frame, the frame whole, the size positive"
    for row in rows:
        try:
            frame, *sides = map(float, row)
            whole = frame == int(frame) and len(sides) == 4 and all(map(math.isfinite, sides)) and min(sides[2:]) > 0
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole or int(frame) in boxes:
            raise UserError(f"boxes: got {row!r}, {wanted}")
        boxes[int(frame)] = [Box(0, *sides)]
    return boxes


def _tracklet(frames: str | Path | Iterable[ImageLike], number: int) -> Tracklet:
    """Make a tracklet of frames in any form."""
    name = f"tracklet {number}"
    if isinstance(frames, str | Path):
        folder = Path(frames)
        if folder.is_file():
            raise UserError(f"frames: got the file {folder}, wanted a list of images, or a folder; a video needs boxes")
        return Tracklet(-1, -1, frames_of_folder(folder, "frames"), str(folder))
    one = isinstance(frames, np.ndarray) and frames.ndim != 4
    if one or not isinstance(frames, Iterable) or isinstance(frames, bytes | Tensor | Image.Image):
        raise UserError(f"frames: got one {type(frames).__name__}, wanted a list of images, or a folder")
    made = [_frame(frame, f"{name}, frame {place}") for place, frame in enumerate(frames)]
    if not made:
        raise UserError(f"frames: got none for {name}, wanted at least one")
    return Tracklet(-1, -1, made, name)


def _frame(frame: Any, where: str) -> Frame:
    if isinstance(frame, str | Path):
        return Path(frame)
    if isinstance(frame, Image.Image):
        frame = pixels_of(frame.copy(), where)
    if not isinstance(frame, np.ndarray):
        raise UserError(f"{where}: got {type(frame).__name__}, wanted a path, a Pillow image or an array")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise UserError(f"{where}: got shape {frame.shape} of {frame.dtype}, wanted (h, w, 3) of uint8, RGB")
    return frame
