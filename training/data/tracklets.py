"""What a dataset is, once read: tracklets of frames, dealt into train, probe and gallery."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from training.errors import UserError

Frame: TypeAlias = Path | np.ndarray
"""An image file, or an (h, w, 3) uint8 RGB array."""

# Everything Pillow lets out of a damaged file; it names no common base for them.
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of 8 bits or fewer: converting a deeper one to RGB clips it
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
        UserError: there is no frame.
    """

    person: int
    camera: int
    frames: tuple[Frame, ...]
    name: str

    def __post_init__(self) -> None:
        if not self.frames:
            raise UserError(f"tracklet {self.name}: got no frames, wanted at least one")


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


def read_frame(frame: Frame) -> torch.Tensor:
    """Read one frame as RGB; an alpha channel is dropped.

    Args:
        frame: an image file, or an (h, w, 3) uint8 RGB array.

    Returns:
        (3, h, w) uint8, contiguous, sharing nothing with `frame`.

    Raises:
        UserError: the file is missing, is not an image that can be read to its end, or is one of 16 bits or of inks.
    """
    if isinstance(frame, Path):
        try:
            with Image.open(frame) as image:
                mode, pixels = image.mode, np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            raise UserError(f"frame {frame}: no such file; copy it again") from None
        except _CORRUPT as error:
            reason = " ".join(str(error).split()).removesuffix(f" {str(frame)!r}")
            what = f"not a readable image ({type(error).__name__}: {reason})"
            raise UserError(f"frame {frame}: {what}; copy it again") from None
        if mode not in _MODES:
            raise UserError(f"frame {frame}: got an image of mode {mode}, wanted one of {', '.join(_MODES)}")
        frame = pixels
    return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1))).clone()
