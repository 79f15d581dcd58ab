"""A packed dataset: one file of frames, as encoded or as PPM, and a checked index of them and of the splits' tracklets.

    header    HEADER
    frames    image files, one after another
    index     arrays, by safetensors

Arrays, where there are N frames, M distinct tracklets and R references of tracklets to frames:

    offsets (N + 1,) uint64        where in the file each frame begins, and the last ends
    checksums (N,) uint32          zlib.crc32 of each frame
    frames (R,) uint32             the frames of the tracklets, one tracklet after another
    starts (M + 1,) uint64         where in `frames` each tracklet begins, and the last ends
    people, cameras (M,) int64
    K.train, K.probe, K.gallery    uint32, the tracklets of split K
    about                          uint8, JSON: dataset, its reader's options, names of tracklets, each split's texts

Frames are read by pread. A memory map, as LMDB's, would save 5 of 450 us per frame, but a failing disk or a damaged
page of LMDB's tree can kill the process, and frames that are not cached take twice as long: a page fault per 4 KiB.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from training.runtime.errors import UserError

MAGIC = b"RRUPACK\x01"  # the last byte is the format's version
HEADER = struct.Struct("<8sQQI4x")  # magic, where the index begins, its length, its crc32
PARTS = ("train", "probe", "gallery")  # of a split, as the index names them
_REMEDY = "make it again with python -m training.pack"


def is_pack(path: Path) -> bool:
    """Return True if a file begins as a packed dataset does, of any version."""
    with path.open("rb") as file:
        return file.read(len(MAGIC) - 1) == MAGIC[:-1]


class NotAPack(UserError):
    """A file of another kind, never to be written over."""


class Pack:
    """An open packed dataset; it survives fork and pickling.

    Args:
        path: the file.
        checksum: the crc32 that its index must have, if it was open before.

    Raises:
        NotAPack: it is something else.
        UserError: it cannot be read, is cut short or damaged, or was made again since it was open before.
    """

    def __init__(self, path: Path, checksum: int | None = None) -> None:
        self.path = path
        try:
            self.file = path.open("rb", buffering=0)
            index = self._read_index()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if checksum not in (None, self._checksum):
            raise UserError(f"{path}: made again while it was in use; start again")
        try:
            self.arrays = safetensors.numpy.load(index)
            self.about: dict[str, Any] = json.loads(self.arrays["about"].tobytes())
        except (SafetensorError, ValueError, KeyError) as error:  # with its checksum right: by another program
            raise UserError(f"{path}: its index cannot be read ({error}); {_REMEDY}") from None
        self.has_pixels = bool(self.about.get("pixels"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Pack, (self.path, self._checksum)

    def _read_index(self) -> bytes:
        size = os.fstat(self.file.fileno()).st_size
        header = self.file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC[: len(header)]:
            raise NotAPack(f"{self.path}: not a packed dataset; wanted a dataset's folder, or a file by training.pack")
        if len(header) < HEADER.size:
            raise UserError(f"{self.path}: got {size} bytes without a whole header; {_REMEDY}")
        _, begin, length, self._checksum = HEADER.unpack(header)
        if size != begin + length:
            raise UserError(f"{self.path}: got {size} bytes, wanted {begin + length}; {_REMEDY}")
        self.file.seek(begin)
        index = self.file.readall()
        if zlib.crc32(index) != self._checksum:
            raise UserError(f"{self.path}: its index is damaged; {_REMEDY}")
        return index


def write_pack(
    file: BinaryIO, image_files: Iterable[bytes], arrays: dict[str, np.ndarray], about: dict[str, Any]
) -> None:
    """Write a whole pack, and return once it is on the disk.

    Args:
        file: a new one.
        image_files: the frames, as encoded or by `to_ppm`.
        arrays: those of the index but `offsets`, `checksums` and `about`.
        about: the index's last one.
    """
    file.write(bytes(HEADER.size))
    offsets, checksums = [HEADER.size], []
    for image_file in image_files:
        file.write(image_file)
        offsets.append(offsets[-1] + len(image_file))
        checksums.append(zlib.crc32(image_file))
    index = safetensors.numpy.save(
        {
            **arrays,
            "offsets": np.array(offsets, np.uint64),
            "checksums": np.array(checksums, np.uint32),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }
    )
    file.write(index)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, offsets[-1], len(index), zlib.crc32(index)))
    file.flush()
    os.fsync(file.fileno())


def to_ppm(pixels: np.ndarray) -> bytes:
    """Return an image file that holds an (h, w, 3) uint8 array as it is."""
    return b"P6\n%d %d\n255\n" % pixels.shape[1::-1] + pixels.tobytes()


@dataclass(frozen=True)
class PackedFrame:
    """A frame of a packed dataset, by its number there."""

    pack: Pack
    number: int

    def encoded(self) -> bytes:
        """Read its image file.

        Raises:
            UserError: it cannot be read, or is not the one that was packed.
        """
        arrays = self.pack.arrays
        first, end = arrays["offsets"][self.number : self.number + 2].tolist()
        try:
            content = os.pread(self.pack.file.fileno(), end - first, first)
        except OSError as error:
            raise UserError(f"frame {self}: cannot be read ({error.strerror}); {_REMEDY}") from None
        if zlib.crc32(content) != arrays["checksums"][self.number]:
            raise UserError(f"frame {self}: damaged, its checksum is another; {_REMEDY}")
        return content

    def pixels(self) -> np.ndarray:
        """Read its pixels, (h, w, 3) uint8, without a decoder; for packs that have them.

        Raises:
            UserError: as `encoded`.
        """
        ppm = self.encoded()
        width, height = map(int, ppm.split(b"\n", 2)[1].split())
        return np.frombuffer(ppm, np.uint8, offset=len(ppm) - height * width * 3).reshape(height, width, 3)

    def __str__(self) -> str:
        """Name it for messages: its place in the first tracklet that has it."""
        arrays = self.pack.arrays
        place = int(np.flatnonzero(arrays["frames"] == self.number)[0])
        tracklet = int(np.searchsorted(arrays["starts"], place, side="right")) - 1
        return f"{place - int(arrays['starts'][tracklet])} of {self.pack.about['names'][tracklet]} in {self.pack.path}"


@dataclass(frozen=True)
class PackedFrames(Sequence[PackedFrame]):
    """The frames of a tracklet, made as they are asked for: a dataset may have a million.

    pack: where they are.
    places: where in its array `frames` their numbers are.
    """

    pack: Pack
    places: range

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int | slice) -> Any:
        if isinstance(item, slice):
            return PackedFrames(self.pack, self.places[item])
        return PackedFrame(self.pack, int(self.pack.arrays["frames"][self.places[item]]))
