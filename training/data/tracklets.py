"""Tracklets of frames, splits of them into train, query and gallery, and the decoding of frames."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from training.data.pack_file import PackedFrame
from training.runtime.errors import UserError

Frame: TypeAlias = Path | np.ndarray | PackedFrame
"""An image file, an (h, w, 3) uint8 RGB array, or an image in a packed dataset."""

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of 8 bits or fewer: converting a deeper one to RGB clips it
_ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # keys of an image's info
# Everything Pillow raises on a damaged file; they have no common base class.
_CORRUPT = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Tracklet:
    """A sequence of frames of one person by one camera.

    Args:
        person: identity, as the dataset numbers it.
        camera: the camera, as the dataset numbers it.
        frames: in order of time, at least one.
        name: its name in messages, e.g. "cam1/person001".

    Raises:
        UserError: there is no frame, or the person's number is beyond int64.
    """

    person: int
    camera: int
    frames: Sequence[Frame]
    name: str

    def __post_init__(self) -> None:
        if not self.frames:
            raise UserError(f"tracklet {self.name}: got no frames, wanted at least one")
        if not -(2**63) <= self.person < 2**63:
            raise UserError(f"tracklet {self.name}: got person {self.person}, wanted a number within int64")


@dataclass(frozen=True)
class Split:
    """Training, query and gallery tracklets of a dataset.

    Args:
        train: tracklets to train on.
        query: query tracklets.
        gallery: tracklets ranked for each query.
        protocol: the name of the evaluation protocol the split is made for.
        description: one line for a reader: dataset, split, counts, held-out people.
        names: the people's own names by their numbers, where these mean nothing outside of this split.
    """

    train: tuple[Tracklet, ...]
    query: tuple[Tracklet, ...]
    gallery: tuple[Tracklet, ...]
    protocol: str
    description: str
    names: Mapping[int, str] | None = None

    def names_of(self, part: Iterable[Tracklet]) -> set[str]:
        """Return the own names of the people of a part; none where their numbers are their names."""
        return {self.names[tracklet.person] for tracklet in part} if self.names else set()

    @property
    def train_people(self) -> tuple[int, ...]:
        """Distinct training identities, sorted: the order of the classifier's outputs."""
        return people_of(self.train)

    def part(self, name: str) -> tuple[Tracklet, ...]:
        """Return the tracklets of "train", "query" or "gallery", or "all" of them, each once."""
        if name != "all":
            tracklets: tuple[Tracklet, ...] = getattr(self, name)
            return tracklets
        distinct = {id(tracklet): tracklet for tracklet in (*self.train, *self.query, *self.gallery)}
        return tuple(distinct.values())


def people_of(tracklets: Iterable[Tracklet]) -> tuple[int, ...]:
    """Return the distinct identities of `tracklets`, sorted."""
    return tuple(sorted({tracklet.person for tracklet in tracklets}))


def read_frame(frame: Frame, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Read one frame as RGB, upright; an alpha channel is dropped.

    Args:
        frame: an image file, an array or a packed frame.
        size: height and width to resize it to, bicubic, by Pillow; not resized if not given.

    Returns:
        (3, h, w) uint8, stored channels last, sharing no memory with `frame`.

    Raises:
        UserError: the file is missing, is not an image that can be read to its end, or is one of 16 bits or of inks.
    """
    return torch.from_numpy(read_pixels(frame, size).copy()).permute(2, 0, 1)


def read_pixels(frame: Frame, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read one frame like `read_frame`, as an (h, w, 3) uint8 array; an array that has the size is returned itself."""
    if isinstance(frame, np.ndarray):
        pixels = frame
    elif isinstance(frame, PackedFrame) and frame.pack.has_pixels:
        pixels = frame.pixels()
    else:
        pixels = decode(encoded(frame), frame)
    if size is None or pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def encoded(frame: Path | PackedFrame) -> bytes:
    """Read the bytes of a frame's image file.

    Raises:
        UserError: they cannot be read, or are not the bytes that were packed.
    """
    if isinstance(frame, PackedFrame):
        return frame.encoded()
    try:
        return frame.read_bytes()
    except FileNotFoundError:
        raise UserError(f"frame {frame}: no such file; copy it again") from None
    except OSError as error:
        raise UserError(f"frame {frame}: cannot be read ({error.strerror}); copy it again") from None


def decode(image_file: bytes, frame: Path | PackedFrame) -> np.ndarray:
    """Decode an image to (h, w, 3) uint8 RGB, upright by its EXIF orientation.

    An orientation that cannot be read is ignored, as in image viewers.

    Args:
        image_file: the bytes of the file.
        frame: their origin, for messages.

    Raises:
        UserError: it cannot be read to its end, or is one of 16 bits or of inks.
    """
    try:
        with Image.open(BytesIO(image_file)) as image:
            return pixels_of(image, str(frame))
    except UserError:
        raise
    except _CORRUPT as error:
        reason = re.sub(" <.*>", "", " ".join(str(error).split()))  # without Pillow's name of an in-memory file
        what = f"not a readable image ({type(error).__name__}: {reason})"
        raise UserError(f"frame {frame}: {what}; copy it again") from None


def pixels_of(image: Image.Image, name: str) -> np.ndarray:
    """Return the pixels of an image as `decode` does; it is turned upright in place.

    Raises:
        UserError: it is one of 16 bits or of inks; what Pillow raises while it is read is not caught.
    """
    mode = image.mode
    image.load()
    if mode not in _MODES:
        raise UserError(f"frame {name}: got an image of mode {mode}, wanted one of {', '.join(_MODES)}")
    _set_upright(image)
    return np.asarray(image if mode == "RGB" else image.convert("RGB"))


def _set_upright(image: Image.Image) -> None:
    """Rotate and flip an image in place by its EXIF orientation; free if it has no metadata."""
    if not _ORIENTED & image.info.keys():  # the orientation of a TIFF file is applied by load()
        return
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Pillow raises anything on damaged metadata
        pass
