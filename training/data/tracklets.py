"""What a dataset is, once read: tracklets of frames, dealt into train, probe and gallery."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Sequence
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
# Everything Pillow lets out of a damaged file; it names no common base for them.
_CORRUPT = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Tracklet:
    """One person seen once by one camera.

    Args:
        person: identity, as the dataset numbers it.
        camera: the camera, as the dataset numbers it.
        frames: in order of time, at least one.
        name: what to call it in messages, e.g. "cam1/person001".

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
    """The tracklets to train on and those to evaluate on.

    Args:
        train: tracklets to train on.
        probe: the queries.
        gallery: what the queries are ranked against.
        protocol: the name of the evaluation protocol the split is made for.
        description: one line for people: dataset, split, counts, what was held out.
    """

    train: tuple[Tracklet, ...]
    probe: tuple[Tracklet, ...]
    gallery: tuple[Tracklet, ...]
    protocol: str
    description: str

    @property
    def train_people(self) -> tuple[int, ...]:
        """The distinct identities trained on, sorted: the order of the classifier's outputs."""
        return people_of(self.train)


def people_of(tracklets: Iterable[Tracklet]) -> tuple[int, ...]:
    """Return the distinct identities of `tracklets`, sorted."""
    return tuple(sorted({tracklet.person for tracklet in tracklets}))


def read_frame(frame: Frame, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Read one frame as RGB, upright; an alpha channel is dropped.

    Args:
        frame: where its pixels are.
        size: height and width to resize it to, bicubic, by Pillow; as it is if not given.

    Returns:
        (3, h, w) uint8, stored channels last, sharing nothing with `frame`.

    Raises:
        UserError: the file is missing, is not an image that can be read to its end, or is one of 16 bits or of inks.
    """
    return torch.from_numpy(read_pixels(frame, size).copy()).permute(2, 0, 1)


def read_pixels(frame: Frame, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read one frame as `read_frame` does, to an (h, w, 3) uint8 array: of an array that has its size, itself."""
    pixels = frame if isinstance(frame, np.ndarray) else decode(encoded(frame), frame)
    if size is None or pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def encoded(frame: Path | PackedFrame) -> bytes:
    """The bytes of a frame's image file.

    Raises:
        UserError: they cannot be read, or are not those that were packed.
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
    """Decode an image to (h, w, 3) uint8 RGB, upright as its EXIF orientation says.

    An orientation that cannot be read is ignored, as image viewers ignore it.

    Args:
        image_file: the bytes of the file.
        frame: where they come from, for messages.

    Raises:
        UserError: it cannot be read to its end, or is one of 16 bits or of inks.
    """
    try:
        with Image.open(BytesIO(image_file)) as image:
            mode = image.mode
            image.load()
            _set_upright(image)
            pixels = np.asarray(image if mode == "RGB" else image.convert("RGB"))
    except _CORRUPT as error:
        reason = re.sub(" <.*>", "", " ".join(str(error).split()))  # Pillow tells of a file that is none here
        what = f"not a readable image ({type(error).__name__}: {reason})"
        raise UserError(f"frame {frame}: {what}; copy it again") from None
    if mode not in _MODES:
        raise UserError(f"frame {frame}: got an image of mode {mode}, wanted one of {', '.join(_MODES)}")
    return pixels


def _set_upright(image: Image.Image) -> None:
    """Turn and mirror an image in place by its EXIF orientation, at no cost where it has no metadata."""
    if not _ORIENTED & image.info.keys():  # a TIFF file's is applied by load()
        return
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged metadata has Pillow raise anything
        pass
